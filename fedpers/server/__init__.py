"""The server half: sampling, exchange, folding, evaluation, and what is done around the mean."""

from fedpers.server.postprocessors import within

__all__ = ["within"]
