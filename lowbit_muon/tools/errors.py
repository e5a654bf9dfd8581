"""The one error of the command line that its user can act on."""


class UserError(Exception):
    """Something the user can mend; the message says what was expected and what came."""
