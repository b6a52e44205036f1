"""The merge methods: one file per paper, one visible table.

Adding a method: write one file (a config dataclass, a function of one layer, a `Method`) and add its line here. Flags,
`hf-epimer methods`, the model card and the invariant tests follow. A method file imports torch and the numerics where
it computes, not at its top, so that the table is read, and wrong words are found, before torch is loaded.
"""

from __future__ import annotations

from hf_epimer.errors import UsageError
from hf_epimer.methods.base import Layer, LayerMerge, Method, MethodConfig
from hf_epimer.methods.dare import DARE
from hf_epimer.methods.epimer import EPIMER
from hf_epimer.methods.epimer_core import EPIMER_CORE
from hf_epimer.methods.fisher_averaging import FISHER, GRADIENT_MATCHING
from hf_epimer.methods.frechet_lora import FRECHET_LORA
from hf_epimer.methods.iso import ISO_C, ISO_CTS
from hf_epimer.methods.kronecker_core import KRONECKER_CORE
from hf_epimer.methods.linear import MEAN, NAN, TASK_ARITHMETIC
from hf_epimer.methods.regmean import REGMEAN
from hf_epimer.methods.ties import TIES
from hf_epimer.methods.tsv import TSV_M
from hf_epimer.methods.wudi import WUDI

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        EPIMER,
        EPIMER_CORE,
        KRONECKER_CORE,
        TSV_M,
        ISO_C,
        ISO_CTS,
        MEAN,
        TASK_ARITHMETIC,
        TIES,
        DARE,
        FISHER,
        REGMEAN,
        GRADIENT_MATCHING,
        NAN,
        WUDI,
        FRECHET_LORA,
    )
}

DEFAULT_METHOD = EPIMER_CORE.name
"""The best that there is with images, with published statistics, and without either; `epimer` is the paper's."""

__all__ = ["DEFAULT_METHOD", "METHODS", "Layer", "LayerMerge", "Method"]


def find_method(name: str) -> Method:
    """The method of this name.

    Raises:
        UsageError: listing the names there are.
    """
    if name not in METHODS:
        raise UsageError(f"there is no method {name!r}; there are {', '.join(METHODS)}")
    return METHODS[name]


def method_of(config: MethodConfig) -> Method:
    """The method that a config belongs to.

    Raises:
        UsageError: it is no method's config.
    """
    for method in METHODS.values():
        if type(config) is method.config:
            return method
    raise UsageError(f"{type(config).__name__} is no method's config")
