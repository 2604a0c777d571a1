"""The one exception of the package."""


class ZsuError(ValueError):
    """Bad input, said once and clearly: what is wrong, where, and what to do about it.

    Parameters
    ----------
    what : str
        What is wrong, with the offending value or shape in it.
    where : str, optional
        The layer, file or function it was found in.
    remedy : str, optional
        What the caller can do.
    """

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None):
        self.what, self.where, self.remedy = what, where, remedy
        message = f"{where}: {what}" if where else what
        super().__init__(f"{message}. {remedy}." if remedy else message)
