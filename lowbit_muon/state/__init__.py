"""What is kept between steps, and how it is stored."""
