"""The one error of the planner that its user can act on."""


class PlanError(Exception):
    """Something the user can mend; the message says what was expected and what came."""
