"""What a hostile file would carry."""


class Effect:
    """Something that acts when it is unpickled, and then is ``result``; a new one has not ``happened``."""

    happened = False

    def __init__(self, result=None):
        self.result = result
        Effect.happened = False

    def __reduce__(self):
        return act, (self.result,)


def act(result):
    Effect.happened = True
    return result
