"""The two ways in which a command ends badly, and their exit statuses."""


class UserError(ValueError):
  """Bad usage, configuration or data; the message says where, and the way out. Exit status 2."""


class RunError(RuntimeError):
  """The run itself failed (no good checkpoint, non-finite loss that stays). Exit status 1."""
