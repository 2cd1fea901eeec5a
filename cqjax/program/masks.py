"""Products whose weight has entries that are always zero."""

import dataclasses

import numpy as np

from cqjax.program.forms import Form
from cqjax.program.known import Constant
from cqjax.program.lookups import Lookup
from cqjax.program.ragged import Ragged


def masked(form: Form, pattern: np.ndarray) -> Form | str:
    """The form with a weight some of whose entries are always zero, or why there is none.

    A feature whose weights are zero for all outputs takes no part in X. An output whose weights are
    zero needs nothing, since the outputs are solved for one by one. But where the outputs have
    different features, each has a problem of its own.

    Args:
      form: the form.
      pattern: which entries may differ from zero, for each trip of the loops that scan over them.
    """
    if isinstance(form, Lookup):
        return form
    if isinstance(form, Ragged):
        return form if pattern.all() else "is masked in a ragged product"
    if (pattern != pattern[:1]).any():
        return "is masked differently from trip to trip of a scan"
    used = form.weight.pack(pattern[0])
    features, outputs = used.any(2), used.any(1)
    if (used != features[:, :, None] & outputs[:, None]).any():
        return "is masked differently for different outputs, of which each needs a solve of its own"
    return form if features.all() else dataclasses.replace(form, live=Constant(features))
