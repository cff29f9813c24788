"""The border of the kernels: every bad argument is refused by name, with what is allowed."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

from dng_kernels import (
    StepPlan,
    StepResult,
    dng_step,
    guide,
    noise_keys,
    standard_normal,
    update_posterior,
)
from dng_math import (
    CRG,
    DDIM,
    DynamicNegativeGuidance,
    ExactPosterior,
    FeedbackGuidance,
    LimitedInterval,
    LogOddsTracker,
    NegativePrompting,
    NoiseSchedule,
    PaperTracker,
    PerpNeg,
    SafeLatentDiffusion,
    Unguided,
)

STEPS = 10
SHAPE = (2, 3, 4)
C = NoiseSchedule.linear(STEPS).coefficients()
TRACKED_RULE = DynamicNegativeGuidance(1.0, PaperTracker(prior=0.1, offset=0.01))
DIVERGENT_RULE = DynamicNegativeGuidance(1.0, PaperTracker(prior=0.1, divergence=True))
PLANS = {
    "tracked": StepPlan(C, TRACKED_RULE),
    "static": StepPlan(C, NegativePrompting(2.0)),
    "safe": StepPlan(C, SafeLatentDiffusion()),
    "perpendicular": StepPlan(C, PerpNeg()),
    "cfg": StepPlan(C, NegativePrompting(2.0), cfg_scale=3.0),
    "evidence": StepPlan(C, CRG(), cfg_scale=3.0),
    "divergence": StepPlan(C, DIVERGENT_RULE),
    # Its posterior is wrong, which the plan says, and which is not what these tests are about.
    "no noise": StepPlan(
        NoiseSchedule.linear(STEPS).coefficients(DDIM()), TRACKED_RULE, _warn=False
    ),
}
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def event(shape=SHAPE, dtype=torch.float32, **options):
    return torch.zeros(shape, dtype=dtype, **options)


def per_sample(n=2, dtype=torch.float32, **options):
    return torch.zeros(n, dtype=dtype, **options)


def with_gradient(shape=SHAPE):
    return torch.zeros(shape, requires_grad=True)


def good_arguments(operation, plan, dtype=torch.float32):
    """What an operation takes on a plan, all of it right."""
    names = {"step": ("x", "eps", "eps_neg"), "guide": ("eps", "eps_neg")}
    events = names.get(operation, ("x", "x_next", "eps", "eps_neg"))
    arguments = {"plan": plan, "step": 0} | {name: event(dtype=dtype) for name in events}
    if plan.has_state:
        arguments["state"] = per_sample(dtype=torch.float32) - 1.0
    if operation == "step":
        arguments["seed"] = 1
    if operation != "update":
        if plan.needs_uncond:
            arguments["eps_uncond"] = event(dtype=dtype)
        if plan.needs_positive:
            arguments["eps_pos"] = event(dtype=dtype)
        arguments["momentum"] = plan.init_momentum(event(dtype=dtype))
    if operation != "guide" and plan.needs_divergence:
        arguments["divergence_gap"] = per_sample()
    return arguments


OPERATIONS = {"step": dng_step, "guide": guide, "update": update_posterior}


def refused(error, words, operation="step", plan="tracked", dtype=torch.float32, **changes):
    """An operation on good arguments but for some is refused in a message with these words."""
    arguments = good_arguments(operation, PLANS[plan], dtype) | changes
    with pytest.raises(error) as caught:
        OPERATIONS[operation](**arguments)
    message = str(caught.value)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("operation", "plan"),
    [
        (operation, plan)
        for operation in OPERATIONS
        for plan in PLANS
        if operation != "update" or PLANS[plan].tracker is not None
    ],
)
def test_good_arguments_are_accepted(operation, plan):
    """Else a refusal below might be of something else."""
    OPERATIONS[operation](**good_arguments(operation, PLANS[plan]))


# ---------------------------------------------------------------- predictions


@pytest.mark.parametrize(
    ("operation", "name", "like"),
    [
        ("step", "eps", "x"),
        ("step", "eps_neg", "x"),
        ("step", "noise", "x"),
        ("guide", "eps_neg", "eps"),
        ("update", "x_next", "x"),
        ("update", "eps", "x"),
        ("update", "eps_neg", "x"),
    ],
)
class TestEveryTensorIsLikeTheFirst:
    def others(self, name):
        return {"seed": None} if name == "noise" else {}

    @pytest.mark.parametrize("shape", [(2, 3), (1, 3, 4), (2, 3, 4, 1), (2, 4, 3), ()])
    def test_in_shape(self, operation, name, like, shape):
        words = (name, f"the shape of {like}", str(SHAPE), str(shape))
        changes = {name: event(shape), **self.others(name)}
        refused(ValueError, words, operation, **changes)

    def test_in_device(self, operation, name, like):
        words = (name, f"the device of {like}, cpu", "got meta")
        changes = {name: event(device="meta"), **self.others(name)}
        refused(ValueError, words, operation, **changes)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.int64, torch.complex64])
    def test_in_precision(self, operation, name, like, dtype):
        words = (name, "float32, float16 or bfloat16", f"torch.float32 {like}", str(dtype))
        changes = {name: event(dtype=dtype), **self.others(name)}
        refused(TypeError, words, operation, **changes)

    def test_in_double_precision(self, operation, name, like):
        words = (name, "float64", f"torch.float64 {like}", "got torch.float32")
        changes = {name: event(), **self.others(name)}
        refused(TypeError, words, operation, dtype=torch.float64, **changes)

    @pytest.mark.parametrize("value", [[[0.0]], 0.0, np.zeros(SHAPE)])
    def test_in_being_a_tensor(self, operation, name, like, value):
        words = (name, "must be a tensor")
        refused(TypeError, words, operation, **{name: value, **self.others(name)})

    def test_in_having_no_gradient(self, operation, name, like):
        words = (name, "requires grad", "torch.no_grad()", f"{name}.detach()")
        changes = {name: with_gradient(), **self.others(name)}
        refused(ValueError, words, operation, **changes)


@pytest.mark.parametrize(("operation", "name"), [("step", "x"), ("guide", "eps"), ("update", "x")])
class TestTheFirstTensor:
    @pytest.mark.parametrize(
        "value",
        [
            event(dtype=torch.int32),
            event(dtype=torch.bool),
            event(dtype=torch.complex64),
            torch.tensor(1.0),
            [0.0],
            None,
        ],
        ids=["int32", "bool", "complex64", "no batch", "list", "None"],
    )
    def test_is_floating_point_with_a_batch(self, operation, name, value):
        refused(
            TypeError,
            (name, "floating-point tensor of shape (batch, ...)"),
            operation,
            **{name: value},
        )

    def test_is_where_the_plan_is(self, operation, name):
        arguments = good_arguments(
            operation, PLANS["static" if operation != "update" else "tracked"]
        )
        arguments = {
            key: value.to("meta") if isinstance(value, torch.Tensor) else value
            for key, value in arguments.items()
        }
        with pytest.raises(ValueError, match=rf"{name} must be on the device of the plan, cpu"):
            OPERATIONS[operation](**arguments)

    def test_has_no_gradient(self, operation, name):
        words = (name, "requires grad", "torch.no_grad()")
        refused(ValueError, words, operation, **{name: with_gradient()})


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        ("step", "x"),
        ("step", "eps"),
        ("guide", "eps"),
        ("guide", "eps_neg"),
        ("update", "x"),
        ("update", "x_next"),
    ],
)
def test_a_sparse_tensor_is_refused_by_name(operation, name):
    words = (name, "must be a dense tensor", "torch.sparse_coo")
    refused(TypeError, words, operation, **{name: event().to_sparse()})


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        ("step", "eps"),
        ("step", "eps_neg"),
        ("guide", "eps_neg"),
        ("update", "x_next"),
        ("update", "eps"),
        ("update", "eps_neg"),
    ],
)
def test_a_prediction_that_is_none_is_refused_by_name(operation, name):
    refused(TypeError, (name, "must be a tensor"), operation, **{name: None})


def test_gradients_may_be_required_where_none_is_recorded():
    with torch.no_grad():
        arguments = good_arguments("step", PLANS["tracked"]) | {"eps": with_gradient()}
        assert not dng_step(**arguments).x_next.requires_grad


# ---------------------------------------------------------------- transforms of torch.func


# Every floating-point argument of every operation, on a plan that reads it.
DIFFERENTIABLE = [
    (operation, "divergence", name)
    for operation, names in {
        "step": ("x", "eps", "eps_neg", "noise", "state", "divergence_gap"),
        "guide": ("eps", "eps_neg", "state"),
        "update": ("x", "x_next", "eps", "eps_neg", "state", "divergence_gap"),
    }.items()
    for name in names
] + [
    ("step", "cfg", "eps_uncond"),
    ("guide", "perpendicular", "eps_pos"),
    ("step", "safe", "momentum"),
]


@pytest.mark.parametrize(("operation", "plan", "name"), DIFFERENTIABLE)
class TestTransforms:
    """A derivative of zero, or an error from deep inside torch, was what they gave before."""

    def function(self, operation, plan, name):
        """The operation as a function of one argument, and a value of it."""
        arguments = good_arguments(operation, PLANS[plan])
        if name == "noise":
            arguments |= {"seed": None, "noise": event()}

        def of(value):
            result = OPERATIONS[operation](**arguments | {name: value})
            return tuple(t for t in result if t is not None)

        return of, arguments[name]

    def refused(self, words, call):
        with pytest.raises(ValueError) as caught:
            call()
        message = str(caught.value)
        assert all(word in message for word in words), message

    def test_a_forward_derivative_is_refused(self, operation, plan, name):
        function, value = self.function(operation, plan, name)
        words = (f"{name} carries a forward derivative", f"{name}.detach()")
        tangent = torch.ones_like(value)
        self.refused(words, lambda: torch.func.jvp(function, (value,), (tangent,)))
        self.refused(words, lambda: torch.func.jacfwd(function)(value))

        def nested(outer):
            return torch.func.jvp(lambda inner: (function(outer), inner), (value,), (tangent,))[1]

        self.refused(words, lambda: torch.func.jvp(nested, (value,), (tangent,)))
        with forward_ad.dual_level():
            self.refused(words, lambda: function(forward_ad.make_dual(value, tangent)))
            function(value)

    def test_a_detached_tensor_has_none(self, operation, plan, name):
        function, value = self.function(operation, plan, name)
        tangent = torch.ones_like(value)

        def detached(at):
            return at, function(at.detach())

        _, (same, _) = torch.func.jvp(detached, (value,), (tangent,))
        assert torch.equal(same, tangent)

    def test_a_batch_of_vmap_is_refused(self, operation, plan, name):
        function, value = self.function(operation, plan, name)
        words = (f"{name} is batched by torch.vmap", "(B, ...)")
        self.refused(words, lambda: torch.vmap(function)(torch.stack([value, value])))
        derivative = torch.func.jacrev(function)
        self.refused((name,), lambda: torch.vmap(derivative)(torch.stack([value, value])))

    def test_what_is_not_transformed_may_be_used_inside(self, operation, plan, name):
        function, value = self.function(operation, plan, name)
        expected = function(value)

        def other(at):
            return at, function(value)

        ones = torch.ones(3)
        (_, result), (tangent, _) = torch.func.jvp(other, (ones,), (ones,))
        assert torch.equal(tangent, ones)
        for one, same in zip(result, expected, strict=True):
            assert torch.equal(one, same)


def test_integers_and_outputs_of_vmap_are_refused():
    """Which are no derivatives of anything, but can be batched."""
    arguments = good_arguments("step", PLANS["tracked"])
    for name, values in {
        "step": torch.arange(3),
        "seed": torch.stack([noise_keys(seed, 2) for seed in range(3)]),
    }.items():
        with pytest.raises(ValueError, match=f"{name} is batched by torch.vmap"):
            torch.vmap(lambda value, name=name: dng_step(**arguments | {name: value}))(values)

    def into(x_next):
        return dng_step(**arguments, out=StepResult(x_next, None, None, None, None))

    with pytest.raises(ValueError, match="out.x_next is batched by torch.vmap"):
        torch.vmap(into)(torch.stack([event(), event()]))
    keys = torch.stack([noise_keys(seed, 2) for seed in range(3)])
    with pytest.raises(ValueError, match="seed is batched by torch.vmap"):
        torch.vmap(lambda seed: standard_normal(seed, (2, 3)))(keys)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_predictions_may_be_narrower_than_x(dtype):
    arguments = good_arguments("step", PLANS["tracked"])
    result = dng_step(**arguments | {"eps": event(dtype=dtype), "return_guided": True})
    assert (result.x_next.dtype, result.eps_guided.dtype) == (torch.float32, dtype)


@pytest.mark.parametrize("operation", ["step", "guide"])
@pytest.mark.parametrize(
    ("plan", "name"),
    [("cfg", "eps_uncond"), ("perpendicular", "eps_pos"), ("safe", "momentum")],
)
class TestAThirdTensor:
    def test_is_there_where_the_plan_reads_it(self, operation, plan, name):
        refused(ValueError, (name, "must be given"), operation, plan, **{name: None})

    def test_is_absent_where_the_plan_does_not(self, operation, plan, name):
        words = (name, "must be None", "nothing in this plan reads it")
        refused(ValueError, words, operation, "static", **{name: event()})

    def test_has_the_shape_of_the_first(self, operation, plan, name):
        refused(ValueError, (name, str(SHAPE), "(2, 4)"), operation, plan, **{name: event((2, 4))})

    def test_has_the_device_of_the_first(self, operation, plan, name):
        changes = {name: event(device="meta")}
        refused(ValueError, (name, "cpu", "got meta"), operation, plan, **changes)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
    def test_has_the_precision_of_the_first(self, operation, plan, name, dtype):
        words = (name, "float32", str(dtype))
        refused(TypeError, words, operation, plan, **{name: event(dtype=dtype)})

    def test_is_a_tensor(self, operation, plan, name):
        refused(TypeError, (name, "must be a tensor"), operation, plan, **{name: [0.0]})

    def test_has_no_gradient(self, operation, plan, name):
        refused(ValueError, (name, "requires grad"), operation, plan, **{name: with_gradient()})


@pytest.mark.parametrize("operation", ["step", "guide"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_momentum_is_never_narrow(operation, dtype):
    """It adds up over the steps."""
    words = ("momentum", "float32", str(dtype))
    refused(TypeError, words, operation, "safe", momentum=event(dtype=dtype))


# ---------------------------------------------------------------- one number a sample


@pytest.mark.parametrize(
    ("operation", "plan", "name"),
    [
        ("step", "tracked", "state"),
        ("guide", "tracked", "state"),
        ("update", "tracked", "state"),
        ("step", "divergence", "divergence_gap"),
        ("update", "divergence", "divergence_gap"),
    ],
)
class TestOneNumberASample:
    def test_is_there_where_the_plan_reads_it(self, operation, plan, name):
        refused(ValueError, (name, "must be given"), operation, plan, **{name: None})

    def test_is_a_tensor(self, operation, plan, name):
        words = (name, "must be a tensor", "[0.0, 0.0]")
        refused(TypeError, words, operation, plan, **{name: [0.0, 0.0]})

    @pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1)])
    def test_has_shape_batch(self, operation, plan, name, shape):
        words = (name, "(2,)", str(shape))
        refused(ValueError, words, operation, plan, **{name: event(shape)})

    def test_is_on_the_device(self, operation, plan, name):
        words = (name, "must be on cpu", "got meta")
        refused(ValueError, words, operation, plan, **{name: per_sample(device="meta")})

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
    def test_is_float32(self, operation, plan, name, dtype):
        words = (name, "must be float32", str(dtype))
        refused(TypeError, words, operation, plan, **{name: per_sample(dtype=dtype)})

    @pytest.mark.parametrize("state_dtype", [torch.float32, torch.float64])
    def test_may_be_float64_beside_float64(self, operation, plan, name, state_dtype):
        arguments = good_arguments(operation, PLANS[plan], torch.float64)
        value = per_sample(dtype=state_dtype) - 1.0
        OPERATIONS[operation](**arguments | {name: value})

    def test_is_contiguous(self, operation, plan, name):
        words = (name, "contiguous", "(2,)")
        refused(ValueError, words, operation, plan, **{name: per_sample(4)[::2]})

    def test_has_no_gradient(self, operation, plan, name):
        words = (name, "requires grad")
        refused(ValueError, words, operation, plan, **{name: with_gradient((2,))})


@pytest.mark.parametrize("operation", ["step", "guide"])
@pytest.mark.parametrize("plan", ["static", "safe", "perpendicular", "cfg"])
def test_a_state_is_refused_where_nothing_is_tracked(operation, plan):
    refused(ValueError, ("state", "must be None"), operation, plan, state=per_sample())


@pytest.mark.parametrize("operation", ["step", "update"])
def test_a_divergence_is_refused_where_none_is_read(operation):
    words = ("divergence_gap", "must be None")
    refused(ValueError, words, operation, divergence_gap=per_sample())


def test_nothing_is_updated_where_nothing_is_tracked():
    words = ("plan", "tracks a posterior", "NegativePrompting")
    refused(ValueError, words, "update", "static", state=per_sample())


# ---------------------------------------------------------------- plan, step, backend


@pytest.mark.parametrize("operation", OPERATIONS)
class TestThePlanAndWhereInIt:
    @pytest.mark.parametrize("value", [None, "plan", 3, TRACKED_RULE])
    def test_a_plan_is_a_step_plan(self, operation, value):
        arguments = good_arguments(operation, PLANS["tracked"]) | {"plan": value}
        with pytest.raises(TypeError) as caught:
            OPERATIONS[operation](**arguments)
        # Its type is enough: a plan-like object would print whole schedules.
        assert f"plan must be a StepPlan, got a {type(value).__name__}" in str(caught.value)

    @pytest.mark.parametrize("value", [-1, STEPS, 2**40, np.int64(STEPS)])
    def test_a_step_is_a_row_of_it(self, operation, value):
        refused(ValueError, ("step", "from 0 to 9", repr(value)), operation, step=value)

    @pytest.mark.parametrize("value", [1.0, True, "1", None, [1]])
    def test_a_step_is_an_integer(self, operation, value):
        refused(TypeError, ("step", "integer from 0 to 9", repr(value)), operation, step=value)

    @pytest.mark.parametrize(
        ("value", "words"),
        [
            (torch.tensor(1.0), ("float32",)),
            (torch.tensor(1, dtype=torch.int32), ("int32",)),
            (torch.tensor([1]), ("(1,)",)),
            (torch.zeros((), dtype=torch.int64, device="meta"), ("meta",)),
        ],
        ids=["float", "int32", "one-dimensional", "elsewhere"],
    )
    def test_a_step_on_the_device_is_one_int64(self, operation, value, words):
        words = ("step", "0-dimensional int64 tensor on cpu", *words)
        refused(ValueError, words, operation, step=value)

    def test_a_step_may_be_an_integer_of_numpy(self, operation):
        arguments = good_arguments(operation, PLANS["tracked"])
        OPERATIONS[operation](**arguments | {"step": np.int32(STEPS - 1)})

    @pytest.mark.parametrize("value", ["cuda", "", None, 0, ["auto"]])
    def test_a_backend_is_one_of_four(self, operation, value):
        words = ("backend", "'auto', 'triton', 'cpu', 'reference'", repr(value))
        refused(ValueError, words, operation, backend=value)

    @needs_triton
    def test_the_kernel_is_not_for_double_precision(self, operation):
        words = ("backend", "'triton'", "float32")
        refused(ValueError, words, operation, dtype=torch.float64, backend="triton")


@pytest.mark.parametrize("value", [-1, STEPS])
def test_a_step_tensor_outside_the_plan_is_refused_where_it_is_read_for_free(value):
    refused(ValueError, ("step",), step=torch.tensor(value))


# ---------------------------------------------------------------- randomness


def test_a_noisy_step_needs_noise_or_a_seed():
    refused(ValueError, ("noise or seed must be given",), seed=None)
    refused(ValueError, ("noise or seed must be given",), seed=None, step=torch.tensor(0))


def test_noise_and_seed_are_not_both_given():
    refused(ValueError, ("noise and seed must not both be given",), noise=event())


@pytest.mark.parametrize("step", [0, STEPS - 1, torch.tensor(3)], ids=["first", "last", "tensor"])
def test_a_step_without_variance_needs_no_noise(step):
    arguments = good_arguments("step", PLANS["no noise"]) | {"step": step, "seed": None}
    with_none = dng_step(**arguments)
    with_seed = dng_step(**arguments | {"seed": 3})
    assert torch.equal(with_none.x_next, with_seed.x_next)


def test_the_last_step_of_a_stochastic_sampler_needs_no_noise():
    arguments = good_arguments("step", PLANS["tracked"]) | {"seed": None, "step": STEPS - 1}
    assert torch.isfinite(dng_step(**arguments).x_next).all()


@pytest.mark.parametrize("value", [-1, 2**64, 2**70])
def test_a_seed_is_of_64_bits(value):
    refused(ValueError, ("seed", f"from 0 to {2**64 - 1}", str(value)), seed=value)


@pytest.mark.parametrize("value", [0.5, True, "seed", [1, 2]])
def test_a_seed_is_an_integer(value):
    refused(TypeError, ("seed", "integer", repr(value)), seed=value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(2, dtype=torch.int64), ("shape (2,)",)),
        (torch.zeros(3, 2, dtype=torch.int64), ("shape (3, 2)",)),
        (torch.zeros(2, 2), ("float32",)),
        (torch.zeros(2, 2, dtype=torch.int32), ("int32",)),
        (torch.zeros(2, 2, dtype=torch.int64, device="meta"), ("on meta",)),
        (torch.zeros(2, 2, dtype=torch.int64).T, ("contiguous",)),
    ],
    ids=["one row", "another batch", "float", "int32", "elsewhere", "transposed"],
)
def test_keys_are_a_row_of_two_int64_a_sample(value, words):
    words = ("seed", "contiguous int64 tensor of shape (2, 2) on cpu", "noise_keys", *words)
    refused(ValueError, words, seed=value)


@pytest.mark.parametrize(
    ("value", "error"), [(-1, ValueError), (2**62, ValueError), (0.5, TypeError)]
)
def test_a_first_sample_is_an_index(value, error):
    refused(error, ("first_sample", f"from 0 to {2**62 - 1}", repr(value)), first_sample=value)
    with pytest.raises(error, match="first_sample"):
        noise_keys(1, 2, first_sample=value)


def test_a_sample_has_no_more_elements_than_the_counter():
    """A stride of 0 stands for 64 GiB."""
    huge = torch.zeros(1).expand(1, 2**34 + 1)
    with pytest.raises(ValueError, match=r"x must have at most 2\*\*34 elements a sample"):
        dng_step(PLANS["static"], 0, huge, huge, huge, seed=1)


# ---------------------------------------------------------------- outputs


@pytest.mark.parametrize(
    ("plan", "name"),
    [
        ("tracked", "x_next"),
        ("tracked", "eps_guided"),
        ("safe", "momentum"),
    ],
)
class TestAnOutputOfManyNumbers:
    def refused(self, error, words, plan, name, value):
        out = StepResult(None, None, None, None, None)._replace(**{name: value})
        refused(error, (f"out.{name}", *words), plan=plan, out=out)

    @pytest.mark.parametrize("shape", [(2,), (2, 3), (1, 3, 4), (2, 4, 3)])
    def test_has_the_shape_of_x(self, plan, name, shape):
        self.refused(ValueError, (str(SHAPE), str(shape)), plan, name, event(shape))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32])
    def test_has_its_dtype(self, plan, name, dtype):
        words = ("torch.float32", str(dtype))
        self.refused(ValueError, words, plan, name, event(dtype=dtype))

    def test_is_on_the_device(self, plan, name):
        self.refused(ValueError, ("on cpu", "on meta"), plan, name, event(device="meta"))

    @pytest.mark.parametrize(
        "value",
        [
            event((2, 4, 3)).transpose(1, 2),
            event((2, 6, 4))[:, :3],
            event((2, 3, 8))[..., ::2],
            event((1, 3, 4)).expand(SHAPE),
            event((3, 2, 4)).transpose(0, 1),
        ],
        ids=["transposed", "slice", "every other", "repeated", "batch inside"],
    )
    def test_lies_in_memory_as_x_does(self, plan, name, value):
        words = ("lie in memory as x does", str(value.stride()))
        self.refused(ValueError, words, plan, name, value)

    def test_is_a_tensor(self, plan, name):
        self.refused(TypeError, ("tensor",), plan, name, [0.0])

    def test_has_no_gradient(self, plan, name):
        self.refused(ValueError, ("requires grad",), plan, name, with_gradient())


@pytest.mark.parametrize("name", ["state", "scale"])
class TestAnOutputOfOneNumberASample:
    def refused(self, error, words, name, value):
        out = StepResult(None, None, None, None, None)._replace(**{name: value})
        refused(error, (f"out.{name}", *words), out=out)

    def test_has_shape_batch(self, name):
        self.refused(ValueError, ("(2,)", "(3,)"), name, per_sample(3))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64])
    def test_is_float32(self, name, dtype):
        self.refused(TypeError, ("float32", str(dtype)), name, per_sample(dtype=dtype))

    def test_is_on_the_device(self, name):
        self.refused(ValueError, ("cpu", "meta"), name, per_sample(device="meta"))

    def test_is_contiguous(self, name):
        self.refused(ValueError, ("contiguous",), name, per_sample(4)[::2])

    def test_is_a_tensor(self, name):
        self.refused(TypeError, ("must be a tensor", "[0.0]"), name, [0.0])


@pytest.mark.parametrize("name", ["x_next", "state"])
def test_guidance_alone_has_no_step_and_no_state_to_write(name):
    given = event() if name == "x_next" else per_sample()
    out = StepResult(None, None, None, None, None)._replace(**{name: given})
    refused(ValueError, (f"out.{name}", "must be None"), "guide", out=out)


@pytest.mark.parametrize(
    ("plan", "name"), [("static", "state"), ("static", "momentum"), ("tracked", "momentum")]
)
def test_what_a_plan_does_not_have_cannot_be_written(plan, name):
    given = per_sample() if name == "state" else event()
    out = StepResult(None, None, None, None, None)._replace(**{name: given})
    refused(ValueError, (f"out.{name}", "must be None"), plan=plan, out=out)


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (per_sample(3), ValueError, ("(2,)", "(3,)")),
        (per_sample(dtype=torch.float16), TypeError, ("float32", "float16")),
        (per_sample(device="meta"), ValueError, ("cpu", "meta")),
        ([0.0, 0.0], TypeError, ("must be a tensor",)),
        (with_gradient((2,)), ValueError, ("requires grad",)),
    ],
    ids=["shape", "dtype", "device", "list", "gradient"],
)
def test_an_updated_state_goes_into_a_state(value, error, words):
    refused(error, ("out.state", *words), "update", out=StepResult(state=value))


@pytest.mark.parametrize("value", [event(), (event(),)], ids=["tensor", "tuple"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_out_is_a_step_result(operation, value):
    refused(TypeError, ("out", "StepResult"), operation, out=value)


@pytest.fixture(params=["reference", "cpu", pytest.param("triton", marks=needs_triton)])
def place(request, kernel_device):
    """A backend, and a device where it runs."""
    return request.param, kernel_device if request.param == "triton" else "cpu"


@pytest.mark.parametrize("plan", ["tracked", "static", "safe", "perpendicular", "cfg"])
@pytest.mark.parametrize("names", [("x_next",), ("eps_guided",), ("momentum",), None], ids=str)
def test_outputs_may_be_the_inputs(plan, names, place):
    """Each of them alone, and all at once."""
    backend, device = place
    plan = PLANS[plan].to(device)
    generator = torch.Generator().manual_seed(7)
    arguments = good_arguments("step", plan)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and name != "state":
            arguments[name] = torch.randn(SHAPE, generator=generator)
        if isinstance(value, torch.Tensor):
            arguments[name] = arguments[name].to(device)
    arguments |= {"step": 2, "backend": backend}
    expected = dng_step(**arguments, return_guided=True)
    source = {"x_next": "x", "eps_guided": "eps", "state": "state", "momentum": "momentum"}
    if names is not None:
        source = {name: source[name] for name in names}
    out = {name: arguments.get(given) for name, given in source.items()}
    result = dng_step(**arguments, out=StepResult(*(out.get(n) for n in StepResult._fields)))
    for name, given in out.items():
        if given is not None:
            assert getattr(result, name) is given
    for name in StepResult._fields:
        if getattr(result, name) is not None:
            assert torch.equal(getattr(result, name), getattr(expected, name)), name


@pytest.mark.parametrize("operation", ["step", "guide"])
@pytest.mark.parametrize("shared", ["same", "overlapping"])
def test_two_outputs_in_one_tensor_are_refused(operation, shared):
    """One result would silently be written over the other."""
    memory = event((4, *SHAPE[1:]))
    first, second = memory[:2], memory[:2] if shared == "same" else memory[1:3]
    name = "x_next" if operation == "step" else "momentum"
    out = StepResult(None, None, None, None, None)._replace(eps_guided=first, **{name: second})
    words = (f"out.{name}", "out.eps_guided", "must not share memory")
    refused(ValueError, words, operation, plan="safe", out=out)
    # Neighbours in one allocation share none of it.
    out = out._replace(**{name: memory[2:]})
    run = dng_step if operation == "step" else guide
    result = run(**good_arguments(operation, PLANS["safe"]), out=out)
    assert result.eps_guided is out.eps_guided


def test_a_sampler_without_the_trackers_noise_is_warned_of():
    """At the caller's line; with the divergence, without a tracker or at eta = 1 never."""
    little = NoiseSchedule.linear(STEPS).coefficients(DDIM(0.5))
    with pytest.warns(UserWarning, match=r"eta = 0\.5.*PaperTracker.*divergence=True") as caught:
        StepPlan(little, DynamicNegativeGuidance(1.0, PaperTracker(prior=0.1)))
    assert [record.filename for record in caught] == [__file__]
    with pytest.warns(UserWarning, match="DDIM with eta=1$"):
        StepPlan(little, FeedbackGuidance())  # its tracker has no such option
    plan = StepPlan(little, DIVERGENT_RULE)
    plan.to("cpu")
    StepPlan(little, NegativePrompting(1.0))
    StepPlan(NoiseSchedule.linear(STEPS).coefficients(DDIM(1.0)), TRACKED_RULE)


# ---------------------------------------------------------------- empty batches and samples


class TestNothingToDo:
    @pytest.mark.parametrize("shape", [(0,), (0, 5), (0, 3, 4)])
    def test_an_empty_batch_gives_an_empty_result(self, shape, place):
        backend, device = place
        plan, x = PLANS["tracked"].to(device), event(shape, device=device)
        result = dng_step(plan, 0, x, x, x, plan.init_state(0), seed=1, backend=backend)
        assert result.x_next.shape == shape and result.state.shape == (0,)
        assert guide(plan, 0, x, x, plan.init_state(0), backend=backend).eps_guided.shape == shape
        updated = update_posterior(plan, 0, x, x, x, x, plan.init_state(0), backend=backend)
        assert updated.state.shape == (0,)

    @pytest.mark.parametrize("shape", [(2, 0), (2, 0, 3), (2, 3, 0)])
    def test_without_elements_the_state_gets_its_offset_alone(self, shape, place):
        """No element says anything of the class: the log ratio is 0, and the offset is not."""
        backend, device = place
        plan = PLANS["tracked"].to(device)
        x, state = event(shape, device=device), plan.init_state(2)
        offset = TRACKED_RULE.posterior.offset / (2.0 * C.tracker_variance()[3])
        expected = state.double() + offset
        result = dng_step(
            plan, 3, x, x, x, state, seed=1, return_scale=True, return_guided=True, backend=backend
        )
        assert result.x_next.shape == result.eps_guided.shape == shape
        # Three roundings of numbers below 4.
        assert torch.allclose(result.state.double(), expected, rtol=0, atol=7e-7)
        updated = update_posterior(plan, 3, x, x, x, x, state, backend=backend)
        assert torch.allclose(updated.state.double(), expected, rtol=0, atol=7e-7)
        # p / (1 - p) of the prior 0.1.
        assert np.allclose(result.scale.cpu(), 1 / 9, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("plan", ["safe", "perpendicular", "cfg"])
    def test_without_elements_every_rule_has_a_finite_scale(self, plan, place):
        """SLD's scale is a mean and Perp-Neg's projection a quotient: 0 / 0 must not show."""
        backend, device = place
        plan = PLANS[plan].to(device)
        arguments = {
            key: event((2, 0), device=device) if isinstance(value, torch.Tensor) else value
            for key, value in good_arguments("step", plan).items()
        }
        result = dng_step(**arguments, return_scale=True, backend=backend)
        assert torch.isfinite(result.scale).all()

    @pytest.mark.parametrize("shape", [(0, 5), (2, 0), (2, 0, 3), (2, 3, 0)])
    def test_an_empty_output_may_be_given(self, shape, place):
        backend, device = place
        plan, x = PLANS["static"].to(device), event(shape, device=device)
        out = StepResult(event(shape, device=device), None, None, None, None)
        assert dng_step(plan, 0, x, x, x, seed=1, out=out, backend=backend).x_next is out.x_next


# ---------------------------------------------------------------- the plan


def changed(name, step, value):
    values = np.array(getattr(C, name))
    values[step] = value
    return dataclasses.replace(C, **{name: values})


class TestAPlan:
    @pytest.mark.parametrize("value", [NoiseSchedule.linear(STEPS), None, [1.0]])
    def test_is_of_step_coefficients(self, value):
        with pytest.raises(TypeError, match="coefficients must be a StepCoefficients, got"):
            StepPlan(value, Unguided())

    def test_has_a_step(self):
        fields = [field.name for field in dataclasses.fields(C)]
        empty = dataclasses.replace(C, **{name: getattr(C, name)[:0] for name in fields})
        with pytest.raises(ValueError, match="coefficients must have 1 to 65536 steps, got 0"):
            StepPlan(empty, Unguided())

    def test_has_no_more_steps_than_the_noise_tells_apart(self):
        fields = [field.name for field in dataclasses.fields(C)]
        many = {name: np.resize(getattr(C, name), 2**16 + 1) for name in fields}
        with pytest.raises(ValueError, match="1 to 65536 steps, got 65537"):
            StepPlan(dataclasses.replace(C, **many), Unguided())

    @pytest.mark.parametrize("value", [1e300, -1e300])
    @pytest.mark.parametrize("name", ["x_factor", "x0_factor", "transition_x_factor"])
    def test_has_coefficients_that_float32_holds(self, name, value):
        words = r"coefficients must be finite in float32, but \w+ is -?[0-9.]+e\+[0-9]+ at step 3"
        with pytest.raises(ValueError, match=words):
            StepPlan(changed(name, 3, value), Unguided())

    def test_has_a_variance_that_float32_holds(self):
        words = "coefficients must be finite.*deviation is 1e\\+150 at step 3"
        with pytest.raises(ValueError, match=words):
            StepPlan(changed("step_var", 3, 1e300), Unguided())

    def test_has_no_negative_variance(self):
        with pytest.raises(ValueError, match=r"coefficients.step_var must be >= 0, got -0.25 .* 4"):
            StepPlan(changed("step_var", 4, -0.25), Unguided())

    def test_has_no_negative_variance_of_its_tracker(self):
        with pytest.raises(ValueError, match="tracker's variance must be >= 0"):
            StepPlan(changed("transition_var", 4, -0.25), TRACKED_RULE)

    @pytest.mark.parametrize("scale", [1e39, -1e300])
    def test_has_numbers_that_float32_holds(self, scale):
        with pytest.raises(ValueError, match="guidance_scale"):
            StepPlan(C, NegativePrompting(scale))

    def test_has_noise_at_the_noisier_end(self):
        with pytest.raises(ValueError, match="sigma_t"):
            StepPlan(changed("sigma_t", 3, 0.0), Unguided())

    @pytest.mark.parametrize("value", ["dng", None, 3, type("Mine", (), {"guide": None})()])
    def test_has_a_rule_that_is_known(self, value):
        with pytest.raises(TypeError, match="rule must be one of dng_math.rules, got"):
            StepPlan(C, value)

    @pytest.mark.parametrize(
        "rule",
        [
            DynamicNegativeGuidance(1.0),
            DynamicNegativeGuidance(1.0, ExactPosterior()),
            LimitedInterval(DynamicNegativeGuidance(1.0), 0.2, 0.8),
        ],
    )
    def test_has_no_exact_posterior(self, rule):
        with pytest.raises(ValueError, match="rule must .* LogOddsTracker or a PathTracker.*got"):
            StepPlan(C, rule)

    @pytest.mark.parametrize("value", ["x0", "eps", None, 1])
    def test_has_a_known_kind_of_prediction(self, value):
        with pytest.raises(ValueError, match="prediction_type must be one of 'epsilon', .*got"):
            StepPlan(C, Unguided(), prediction_type=value)

    def test_does_not_take_x0_from_noise_where_x_says_nothing_of_it(self):
        flow = NoiseSchedule.flow(STEPS).coefficients()
        with pytest.raises(
            ValueError, match="prediction_type must not be 'epsilon'.*step 0.*'flow_prediction'"
        ):
            StepPlan(flow, Unguided())
        for prediction in ("v_prediction", "sample", "flow_prediction"):
            assert len(StepPlan(flow, Unguided(), prediction_type=prediction)) == STEPS

    @pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
    def test_clips_to_something(self, value):
        with pytest.raises(ValueError, match="clip must be finite and > 0, got"):
            StepPlan(C, Unguided(), clip=value)

    @pytest.mark.parametrize("value", ["1", True, [1.0]])
    def test_clips_to_a_number(self, value):
        with pytest.raises(TypeError, match="clip must be a real number"):
            StepPlan(C, Unguided(), clip=value)

    def test_has_one_positive_prediction(self):
        with pytest.raises(ValueError, match="cfg_scale must be None for PerpNeg.*got 2.0"):
            StepPlan(C, PerpNeg(), cfg_scale=2.0)

    @pytest.mark.parametrize("value", [[1.0] * 9, [1.0] * 11, [[1.0]] * 10, []])
    def test_has_one_cfg_scale_or_one_a_step(self, value):
        with pytest.raises(ValueError, match=r"cfg_scale must have shape \(10,\), got"):
            StepPlan(C, Unguided(), cfg_scale=value)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), [1.0] * 9 + [float("nan")]])
    def test_has_a_finite_cfg_scale(self, value):
        with pytest.raises(ValueError, match="cfg_scale must be finite, got (nan|inf)"):
            StepPlan(C, Unguided(), cfg_scale=value)

    @pytest.mark.parametrize("tracker", [PaperTracker, LogOddsTracker])
    def test_starts_from_a_prior(self, tracker):
        plan = StepPlan(C, DynamicNegativeGuidance(1.0, tracker()))
        with pytest.raises(ValueError, match=f"prior must be given.*got {tracker.__name__}"):
            plan.init_state(2)

    def test_of_feedback_guidance_starts_from_none(self):
        assert StepPlan(C, FeedbackGuidance()).init_state(3).tolist() == [0.0, 0.0, 0.0]

    @pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (1.5, TypeError)])
    def test_starts_a_batch(self, value, error):
        with pytest.raises(error, match="batch must be an integer >= 0, got"):
            PLANS["tracked"].init_state(value)

    def test_says_what_it_is(self):
        assert repr(PLANS["static"]).startswith("StepPlan(10 steps, NegativePrompting(")


# ---------------------------------------------------------------- a table of bad values


NO_INTEGERS = [None, "1", b"1", 1.5, float("nan"), True, [1], (), {}, torch.tensor(0.5), 1j]
NO_DEVICES = [3.5, [], {}, object, "nowhere", "cpu:x", ""]
NO_DTYPES = [None, "float32", np.float32, float, torch.int32, torch.bool, torch.complex64]
NO_FLAGS = [None, 0, 1, "yes", [], 1.0]
NO_TENSORS = [None, 0.5, "x", [0.5], np.zeros(2), torch.zeros(2, dtype=torch.int64)]
LAST = STEPS - 1  # a step without noise


def step_with(**changes):
    return dng_step(**good_arguments("step", PLANS["tracked"]) | changes)


def guide_with(**changes):
    return guide(**good_arguments("guide", PLANS["tracked"]) | changes)


def keys_with(**changes):
    return noise_keys(**{"seed": 1, "batch": 2} | changes)


def normal_with(**changes):
    return standard_normal(**{"seed": 1, "shape": (2, 3)} | changes)


def plan_with(**changes):
    return StepPlan(**{"coefficients": C, "rule": NegativePrompting(1.0)} | changes)


# What is called, with what else, which argument, its bad values, and what the message allows.
BAD = [
    (step_with, {}, "return_guided", NO_FLAGS, "True or False"),
    (step_with, {}, "return_scale", NO_FLAGS, "True or False"),
    (guide_with, {}, "return_scale", NO_FLAGS, "True or False"),
    # Whether this step makes noise or not, a seed is a seed.
    (step_with, {"step": LAST}, "seed", ["1", 1.5, True, [1], -1, 2**64], "integer from 0"),
    (step_with, {"step": LAST}, "first_sample", [*NO_INTEGERS, -1, 2**62], "integer from 0"),
    (
        step_with,
        {"seed": None, "noise": event()},
        "first_sample",
        [*NO_INTEGERS, -1, 2**62],
        "integer from 0",
    ),
    (keys_with, {}, "seed", [*NO_INTEGERS, -1, 2**64], "integer from 0 to 18446744073709551615"),
    (keys_with, {}, "batch", [*NO_INTEGERS, -1], "integer >= 0"),
    (keys_with, {}, "first_sample", [*NO_INTEGERS, -1, 2**62], "integer from 0"),
    (keys_with, {}, "device", NO_DEVICES, "torch"),
    (normal_with, {}, "seed", [None, "1", 1.5, True, [1], -1, 2**64], "integer from 0"),
    (normal_with, {}, "shape", [None, 3, "23", 1.5, {}, np.array([2, 3])], "tuple of integers"),
    (normal_with, {}, "shape", [(-1,), (2, -3), (2, 1.5), ("2",), (True, 2), (None,)], "integer"),
    (normal_with, {}, "shape", [(), []], "(batch, ...)"),
    (normal_with, {}, "shape", [(1, 2**35)], "2**34 elements a sample"),
    (normal_with, {}, "step", [*NO_INTEGERS[1:], -1, 2**16], "integer from 0 to 65535"),
    (normal_with, {}, "first_sample", [*NO_INTEGERS, -1, 2**62], "integer from 0"),
    (normal_with, {}, "device", NO_DEVICES, "torch"),
    (normal_with, {}, "dtype", NO_DTYPES, "torch.float32, float64, float16 or bfloat16"),
    (plan_with, {}, "coefficients", [None, C.alpha_t, "linear", {}, NoiseSchedule], "Coefficients"),
    (plan_with, {}, "rule", [None, "dng", 1.0, PaperTracker(), PerpNeg, {}], "dng_math.rules"),
    (
        plan_with,
        {},
        "prediction_type",
        [None, "eps", 0, [], "EPSILON", b"sample"],
        "'v_prediction'",
    ),
    (plan_with, {}, "cfg_scale", ["3", True, b"3", 1j, {}, float("inf")], "cfg_scale must"),
    (plan_with, {}, "cfg_scale", [[], [1.0], [[1.0] * STEPS], np.array(1.0)], "shape (10,)"),
    (plan_with, {}, "cfg_scale", [[None] * STEPS], "array of real numbers"),
    (plan_with, {}, "cfg_scale", [["a"] * STEPS], "array of real numbers, got strings"),
    (plan_with, {}, "cfg_scale", [[1j] * STEPS], "array of real numbers, got complex ones"),
    (plan_with, {}, "clip", ["1", True, [1.0], {}, 1j, 0.0, -1.0, float("nan")], "finite and > 0"),
    (plan_with, {}, "device", NO_DEVICES, "torch"),
    (PLANS["tracked"].to, {}, "device", [None, *NO_DEVICES], "torch"),
    (PLANS["tracked"].init_state, {}, "batch", [*NO_INTEGERS, -1], "integer >= 0"),
    (PLANS["tracked"].init_state, {"batch": 2}, "dtype", [*NO_DTYPES, torch.float16], "float64"),
    (PLANS["static"].init_momentum, {}, "x", NO_TENSORS, "floating-point tensor"),
    (PLANS["safe"].init_momentum, {}, "x", NO_TENSORS, "floating-point tensor"),
    (PLANS["tracked"].log_posterior, {}, "state", NO_TENSORS, "floating-point tensor"),
    (PLANS["tracked"].row, {}, "step", [*NO_INTEGERS, -1, STEPS], "integer from 0 to 9"),
    (PLANS["tracked"].column, {}, "name", [None, 3, "rule_0", []], "'x_factor'"),
    (PLANS["tracked"].workspace, {"elements": 3}, "batch", [None, "1", 1.5, -1], "integer >= 0"),
    (PLANS["tracked"].workspace, {"batch": 3}, "elements", [None, "1", 1.5, -1], "integer >= 0"),
]


def shown(value):
    """How a message may write a value."""
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), repr(value)]
    if isinstance(value, np.ndarray):
        return [str(value.shape), repr(value), str(value)]
    # Of a sequence a message may show the shape, or the member that is wrong.
    return [repr(value), *(map(repr, value) if isinstance(value, list | tuple) else ())]


@pytest.mark.parametrize(
    ("call", "others", "name", "value", "allowed"),
    [(call, others, name, v, allowed) for call, others, name, vs, allowed in BAD for v in vs],
)
def test_a_bad_value_is_refused_by_name(call, others, name, value, allowed):
    with pytest.raises((TypeError, ValueError)) as caught:
        call(**others | {name: value})
    message = str(caught.value)
    assert message.startswith(name) and allowed in message, message
    said = (*shown(value), str(np.shape(value)))
    assert "got" in allowed or any(text in message for text in said), message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("call", [keys_with, normal_with, plan_with, PLANS["tracked"].to])
def test_a_device_that_is_not_there_is_refused_by_name(call):
    with pytest.raises(ValueError, match="device must be one that torch finds, got 'cuda'"):
        call(device="cuda")
