"""fastkd.kernels: the math of distillation on a device. Needs torch; triton only where a Triton path is taken.

Names are loaded on first use: importing fastkd.kernels imports neither torch nor triton.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
