"""Random shapes, strides, dtypes, groups and missing gradients, against the textbook in float64."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import Textbook

from fused_sam import FusedSAM

SETTINGS = settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

SGD, ADAM, ADAMW, RMSPROP = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.RMSprop,
)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]

SIZES = st.sampled_from([0, 1, 2, 3, 5, 63, 64, 65, 129])
SHAPES = st.one_of(
    st.just(()),
    st.tuples(SIZES),
    st.tuples(st.sampled_from([0, 1, 3, 8]), SIZES),
    st.tuples(*[st.integers(1, 4)] * 3),
    st.tuples(*[st.integers(1, 4)] * 4),
    st.tuples(st.integers(1, 3), st.integers(1, 3), *[st.integers(1, 3)] * 3),
)
LAYOUTS = st.sampled_from(["contiguous", "reversed", "channels_last", "permuted"])
GRAD_LAYOUTS = st.sampled_from(
    ["same", "same", "same", "contiguous", "reversed", "expanded", "gaps", "offset", "missing"]
)

FUSED_OPTIONS = st.one_of(
    st.tuples(
        st.just(SGD),
        st.fixed_dictionaries(
            {"momentum": st.sampled_from([0.0, 0.9]), "weight_decay": st.sampled_from([0.0, 0.1])},
            optional={"maximize": st.booleans(), "nesterov": st.just(False)},
        ),
    ),
    st.tuples(
        st.sampled_from([ADAM, ADAMW]),
        st.fixed_dictionaries(
            {"betas": st.sampled_from([(0.9, 0.999), (0.5, 0.7), (0.0, 0.9)])},
            optional={
                "amsgrad": st.booleans(),
                "maximize": st.booleans(),
                "weight_decay": st.sampled_from([0.0, 0.2]),
            },
        ),
    ),
    st.tuples(
        st.just(RMSPROP),
        st.fixed_dictionaries(
            {"alpha": st.sampled_from([0.9, 0.5]), "eps": st.just(1e-2)},
            optional={
                "centered": st.booleans(),
                "momentum": st.sampled_from([0.0, 0.7]),
                "weight_decay": st.sampled_from([0.0, 0.1]),
            },
        ),
    ),
)


def laid_out(tensor, layout):
    """The same values in other strides."""
    if layout == "reversed":
        order = range(tensor.dim() - 1, -1, -1)
    elif layout == "permuted" and tensor.dim() > 2:
        order = [1, *range(2, tensor.dim()), 0]
    elif layout == "channels_last" and tensor.dim() in (4, 5):
        order = [0, *range(2, tensor.dim()), 1]
    else:
        return tensor.contiguous()
    inverse = sorted(range(tensor.dim()), key=list(order).__getitem__)
    return tensor.permute(*order).contiguous().permute(*inverse) if tensor.dim() else tensor


def grad_of(param, layout, generator):
    if layout == "missing":
        return None
    kind = torch.complex128 if param.is_complex() else torch.float64
    grad = torch.randn(param.shape, dtype=kind, generator=generator).to(param.grad_dtype)
    if layout == "same":
        return torch.empty_strided(param.shape, param.stride(), dtype=param.grad_dtype).copy_(grad)
    if layout == "expanded" and grad.numel():
        return grad.flatten()[0].expand(param.shape)
    if layout == "gaps" and grad.dim():
        wide = torch.zeros(*param.shape, 2, dtype=param.grad_dtype)
        wide[..., 1] = grad
        return wide[..., 1]
    if layout == "offset":
        flat = torch.zeros(grad.numel() + 1, dtype=param.grad_dtype)
        flat[1:] = grad.flatten()
        return flat[1:].view(param.shape)
    return laid_out(grad, layout)


@SETTINGS
@given(data=st.data(), rule=FUSED_OPTIONS, seed=st.integers(0, 2**16))
def test_any_parameters_and_gradients_step_as_the_textbook(backend, data, rule, seed):
    generator = torch.Generator().manual_seed(seed)
    cls, options = rule
    groups, params = [], []
    for _ in range(data.draw(st.integers(1, 3), label="groups")):
        group = {"params": []}
        for _ in range(data.draw(st.integers(1, 4), label="params")):
            dtype = data.draw(st.sampled_from(DTYPES))
            kind = torch.complex128 if dtype.is_complex else torch.float64
            weights = torch.randn(data.draw(SHAPES), dtype=kind, generator=generator).to(dtype)
            group["params"].append(torch.nn.Parameter(laid_out(weights, data.draw(LAYOUTS))))
            if not dtype.is_complex:
                # Wider and narrower gradients, now and then.
                grad_dtypes = [dtype, dtype, torch.float32, torch.bfloat16]
                group["params"][-1].grad_dtype = data.draw(st.sampled_from(grad_dtypes))
        params += group["params"]
        group["rho"] = data.draw(st.sampled_from([0.0, 0.05, 2.0]))
        group["lr"] = data.draw(st.sampled_from([0.0, 0.01, 0.3]))
        group["eta"] = data.draw(st.sampled_from([0.0, 0.01]))
        group["adaptive"] = data.draw(st.booleans()) and not any(
            p.is_complex() for p in group["params"]
        )
        groups.append(group)
    clip = data.draw(st.sampled_from([None, None, 0.3]), label="max_grad_norm")
    if any(p.dtype == torch.float64 for p in params):
        clip = None  # the clip coefficient is as coarse as the coarsest norm in it
    strides = [p.stride() for p in params]
    opt = FusedSAM(groups, cls, max_grad_norm=clip, backend=backend, **options)
    textbook = Textbook(opt)
    for _ in range(2):
        first, second = (
            {p: grad_of(p, data.draw(GRAD_LAYOUTS), generator) for p in params} for _ in range(2)
        )
        textbook.step(first, second)
    assert [p.stride() for p in params] == strides
