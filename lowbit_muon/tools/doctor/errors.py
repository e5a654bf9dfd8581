"""The one error of `doctor` that its user can act on."""


class DoctorError(Exception):
    """Something the user can mend; the message says what was expected and what came."""
