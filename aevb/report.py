from .answers import Answer


def report(run, out=None, *, seed=0) -> Answer:
    raise NotImplementedError
