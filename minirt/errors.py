"""The errors a user can cause. The command line prints their one line and exits; everything else is a bug."""


class ModelError(ValueError):
    """A file, or what is asked of it, is not usable: names the file, the key and the value. Exit code 1."""


class DeviceError(ModelError):
    """A card cannot do what is asked of it, be it for lack of memory. The CPU may."""


class UsageError(ValueError):
    """A flag or an argument is wrong: says what is allowed. Exit code 2."""
