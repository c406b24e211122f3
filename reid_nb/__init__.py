__version__ = "0.1.0"

# PyTorch's threads wait for each other by spinning, which starves them where another program wants a core: a short
# spin, then sleep (tests/benchmarks/threads.py). GNU OpenMP reads this once, when it is loaded; what the user has set
# stays.
import os as _os
if not {'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME'} & _os.environ.keys():
    _os.environ['GOMP_SPINCOUNT'] = '10000'

def __getattr__(name):
    "`reid_nb.load`, without loading PyTorch for those who do not ask for it."
    if name in ('load', 'Encoder'):
        from .parts import encoder
        return getattr(encoder, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
