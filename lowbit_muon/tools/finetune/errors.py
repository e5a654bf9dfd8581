"""The one error of the fine-tune that its user can act on."""


class FinetuneError(Exception):
    """Something the user can mend; the message says what and how, in one sentence."""
