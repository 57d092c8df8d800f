"""The dotted path of the loader in bundles, see :mod:`amkd_monai.data.sampling`."""

from amkd_monai.data.sampling import MultiTaskLoader

__all__ = ["MultiTaskLoader"]
