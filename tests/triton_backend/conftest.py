"""Without a GPU the kernels run in Triton's interpreter, which must be chosen before the backend is imported.

The ahead-of-time tests need the compiler instead: they run it in a process of its own.
"""

import importlib.util
import os

import numpy
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
elif not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    # Where something, transformers say, imported triton before, its own functions were made for the compiler.
    for module in (tl, tl.standard):
        for name, function in list(vars(module).items()):
            if isinstance(function, triton.JITFunction):
                setattr(module, name, interpreter.InterpretedFunction(function.fn))

    _patch_lang_tensor = interpreter._patch_lang_tensor

    def _patch(tensor, scope):
        """Triton 3.6 and older turn one-element arrays into loop bounds, which numpy 2.4 refuses (triton issue 9171)."""
        _patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch

    _np_dtypes, _get_np_dtype = {}, interpreter._get_np_dtype

    def _np_dtype(found):
        """A table of all types is made anew for every number: a tenth of the time."""
        scalar = found.scalar
        if isinstance(scalar, tl.pointer_type):
            return _get_np_dtype(scalar)
        if scalar.name not in _np_dtypes:
            _np_dtypes[scalar.name] = _get_np_dtype(scalar)
        return _np_dtypes[scalar.name]

    interpreter._get_np_dtype = _np_dtype

    _patch_lang, _patched, _languages = interpreter._patch_lang, set(), {}

    def _patch_once(fn):
        """The language is looked through again for every function that a kernel calls: half of the time that it runs."""
        known = id(fn.__globals__)
        if known not in _languages:
            _languages[known] = {
                m.__name__ for m in (tl, tl.core) if any(m is value for value in fn.__globals__.values())
            }
        if _patched >= _languages[known]:
            return None  # nobody reads it
        outermost = not _patched
        scope = _patch_lang(fn)
        _patched.update(_languages[known])
        if outermost:
            restore = scope.restore
            scope.restore = lambda: (_patched.clear(), restore())
        return scope

    interpreter._patch_lang = _patch_once


@pytest.fixture(autouse=True)
def quiet():
    """What a GPU does in silence: 0 * inf and the like."""
    with numpy.errstate(all="ignore"):
        yield


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that tiny problems take many, with a rest in every dimension."""
    from simct_kernels.triton_backend import tiles

    small = {
        "logsumexp": tiles.Tile(1, 32, 4, each=2),
        "forward": tiles.Tile(4, 32, 4, each=2),
        "forward_scattered": tiles.Tile(4, 32, 4, each=3),
        "gradient": tiles.Tile(4, 32, 4),
        "gradient_scattered": tiles.Tile(4, 32, 4, each=2),
        "softmax": tiles.Tile(1, 32, 4),
        "pick": tiles.Tile(4, 16, 4),
        "pick_one": tiles.Tile(1, 16, 4),
        "weight_gradient": tiles.Tile(4, 16, 4),
        "small": tiles.Tile(4, 32, 4),
    }
    monkeypatch.setattr(tiles, "SEGMENT", 8)
    monkeypatch.setattr(tiles, "TILES", {architecture: small for architecture in tiles.TILES})
