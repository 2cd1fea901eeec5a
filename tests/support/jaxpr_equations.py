"""The equations of a jaxpr, and of those within."""


def equations(jaxpr):
    """All equations, those of inner jaxprs included."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                    yield from equations(inner)


def shapes(jaxpr):
    """The shapes of everything that is computed."""
    results = (v.aval for eqn in equations(jaxpr) for v in eqn.outvars)
    return {aval.shape for aval in results if hasattr(aval, "shape")}
