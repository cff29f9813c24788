"""The kernel compiled ahead of time, for GPUs that need not be here: what the machine code is like.

Every variant comes from a call of a public function, whose launch is caught before it needs a
device.  Tests run under the interpreter where there is no GPU, so the compiler runs in processes of
its own: this file is also their program.  ``python -m tests.kernels.test_compiled`` prints how many
instructions a normal of a seed takes, by what they do.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton
import triton.language as tl

from dng_kernels import fused
from dng_kernels.layout import MOST_CHUNKS

ROOT = Path(__file__).parents[2]
TOOLS = Path(find_spec("triton").origin).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90, 100)
THREADS = 128
PROCESSES = 2
LARGER = ("values", "arithmetic")  # sets of variants that take minutes

# ---------------------------------------------------------------- what can be launched

RULES = ("np", "paper", "log_odds", "cfg", "fbg", "sld", "contrastive", "perp_neg", "geoguide")
# What has CFG beneath and reads the other prediction of it.
LED = ("sld_led", "contrastive_led", "crg")
STEPS = [("step", name) for name in (*RULES, *LED, "weighted")]
GUIDES = [("guide", name) for name in (*RULES, "crg")]
UPDATES = [("update", name) for name in ("paper", "log_odds", "fbg")]
FACTORS = {
    "kind": [*STEPS, *GUIDES, *UPDATES],
    "cfg": [False, True],
    "clip": [False, True],
    "drift": [False, True],
    "divergence": [False, True],
    "noise": ["none", "given", "seed", "wide seed", "keys"],
    # One chunk (a small block, a full one, a part of one); a few; and as many as there can be, of
    # several blocks each.
    "shape": [(2, 8, 8), (2, 32, 16), (3, 16, 16), (4, 64, 64), (4, 1024, 1024)],
    "channels_last": [False, True],
    "dtypes": ["float32", "float16", "bfloat16", "mixed"],
    "outputs": [False, True],
    # Odd: an odd number of elements, so that no row starts where 16 bytes do.
    "aligned": [True, False],
}
# The arithmetic; the other factors say how numbers come and go.
CORE = ("kind", "cfg", "clip", "drift", "divergence")


def launchable(kind, cfg, clip, drift, divergence, noise, aligned, shape, **_):
    """Whether a public function can ask for it."""
    operation, rule = kind
    tracked = rule in ("paper", "log_odds", "fbg")
    return (
        not (cfg and (rule in ("perp_neg", "weighted") or operation == "update"))
        and (cfg or rule not in LED)
        and not (clip and rule == "weighted")
        and not (clip and operation == "guide")
        # What untracked rules load for a drift they do not use.
        and not (drift and not (operation == "step" and tracked))
        and not (divergence and (rule not in ("paper", "log_odds") or operation == "guide"))
        and (noise == "none" or operation == "step")
        and (aligned or shape not in ((2, 8, 8), (4, 1024, 1024)))
    )


def pairs(case):
    return set(itertools.combinations(case.items(), 2))


def variants(which):
    """Cases by architecture: what a sampler of latents launches, for 90 alone; every value of every
    factor, for each; or all arithmetic, for 90 alone.

    What is not of the arithmetic is chosen so that many pairs of values occur together.
    """
    values = itertools.product(*FACTORS.values())
    every = [dict(zip(FACTORS, chosen, strict=True)) for chosen in values]
    every = [case for case in every if launchable(**case)]
    chance = random.Random(0)
    chance.shuffle(every)

    pools = {}
    for case in every:
        pools.setdefault(tuple(case[name] for name in CORE), []).append(case)
    seen, full = set(), []
    for pool in pools.values():
        full.append(max(pool[:100], key=lambda case: len(pairs(case) - seen)))
        seen |= pairs(full[-1])
    missing, some = {value for case in every for value in case.items()}, []
    while missing:
        some.append(max(every[:3000], key=lambda case: len(missing & set(case.items()))))
        missing -= set(some[-1].items())
    latents = [case for case in every if usual(case)]
    if which == "latents":
        return {90: latents}
    if which == "values":
        return dict.fromkeys(ARCHITECTURES, some + latents)
    return {90: full + latents}


def usual(case):
    """What a sampler of latents launches."""
    return (
        tuple(case["kind"]) in (("step", "paper"), ("step", "np"))
        and not any(case[name] for name in ("cfg", "clip", "drift", "divergence"))
        and not (case["channels_last"] or case["outputs"])
        and case["aligned"]
        and case["noise"] in ("given", "seed")
        and tuple(case["shape"]) == (4, 64, 64)
        and case["dtypes"] in ("float32", "bfloat16")
    )


# ---------------------------------------------------------------- what the machine code is like


@pytest.fixture(
    scope="module",
    params=["latents", *(pytest.param(each, marks=pytest.mark.slow) for each in LARGER)],
)
def chosen(request):
    """Which variants: see :func:`variants`."""
    return request.param


@pytest.fixture(scope="module")
def printed(tmp_path_factory, chosen):
    """What the programs found out."""
    if not os.access(TOOLS / "cuobjdump", os.X_OK):
        pytest.skip(f"Triton came without cuobjdump, which reads machine code: none in {TOOLS}")
    folder = tmp_path_factory.mktemp("kernels")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    with contextlib.ExitStack() as stack:
        # Into files: a pipe that nobody reads would hold its program up.
        lines, errors = (
            [stack.enter_context((folder / f"{name}{i}").open("w+")) for i in range(PROCESSES)]
            for name in ("lines", "errors")
        )
        programs = [
            subprocess.Popen(
                [sys.executable, "-m", __spec__.name, str(i), str(folder), chosen],
                cwd=ROOT,
                env=environment,
                stdout=lines[i],
                stderr=errors[i],
            )
            for i in range(PROCESSES)
        ]
        try:
            results = []
            for i, program in enumerate(programs):
                failed = program.wait(timeout=900)
                errors[i].seek(0)
                assert not failed, errors[i].read()[-4000:]
                lines[i].seek(0)
                results += [json.loads(line) for line in lines[i]]
        finally:
            for program in programs:
                program.kill()
                program.wait()
    return results


@pytest.fixture(scope="module")
def kernels(printed):
    """What the compiler made of every variant."""
    return [line for line in printed if "case" in line]


def whole(kernel):
    """Every thread has 16 bytes of every tensor, and they lie where 16 bytes may."""
    return kernel["case"]["aligned"] and kernel["block"] >= 1024


def described(kernels):
    return [(kernel["architecture"], kernel["case"]) for kernel in kernels]


def test_every_variant_compiles_for_every_architecture(kernels, chosen):
    expected = {architecture: len(cases) for architecture, cases in variants(chosen).items()}
    assert set(expected) == set(ARCHITECTURES) if chosen == "values" else expected[90] >= 8
    assert chosen != "arithmetic" or expected[90] > 80
    for architecture, count in expected.items():
        assert sum(kernel["architecture"] == architecture for kernel in kernels) == count


def test_another_seed_or_batch_compiles_nothing(printed):
    """1, what 16 divides and what 32 bits do not hold are special to Triton, unless told not."""
    (count,) = [line["specializations"] for line in printed if "specializations" in line]
    assert count == 1


def test_the_compiler_was_told_what_to_do_with_products_and_sums(kernels):
    """Not left to its default; and the machine code has fused operations."""
    for kernel in kernels:
        assert kernel["fusion"] is True and "enable_fp_fusion" in kernel["options"]
        assert kernel["warps"] * 32 == THREADS
    assert all(kernel["sass"]["fused"] > 0 for kernel in kernels if "sass" in kernel)


def test_every_tensor_is_read_and_written_in_pieces_of_16_bytes_and_once(kernels, chosen):
    """As many accesses as the formula needs, and none of 16 bits: the rest is one of a sample."""
    seen = [kernel for kernel in kernels if whole(kernel)]
    assert len(seen) > {"latents": 6, "values": 20, "arithmetic": 30}[chosen]
    wrong = []
    for kernel in seen:
        accesses = kernel["accesses"]
        loads, stores = accesses.pop("ld128", 0), accesses.pop("st128", 0)
        few = accesses.get("ld32", 0) <= 31 + 3 and accesses.get("st32", 0) <= 8
        # The sums of at most 1024 chunks are set to zero.
        few = few and accesses.pop("st64", 0) <= max(1, MOST_CHUNKS // THREADS)
        if [loads, stores] != kernel["expected"] or not few or accesses.get("ld64", 0) > 3:
            wrong.append(kernel)
        elif not set(accesses) <= {"ld32", "ld64", "st32"}:
            wrong.append(kernel)
    assert not wrong, wrong[:3]


def test_the_machine_code_has_the_accesses_of_the_intermediate_one(kernels, chosen):
    """The counts above are read before the assembler; it neither splits nor repeats them."""
    seen = [kernel for kernel in kernels if "sass" in kernel and whole(kernel)]
    assert len(seen) >= 4
    for kernel in seen:
        assert [kernel["sass"]["ld128"], kernel["sass"]["st128"]] == kernel["expected"], kernel


def test_no_variant_spills(kernels):
    spilled = [kernel for kernel in kernels if kernel["stack"] or kernel["local"]]
    assert not spilled, described(spilled)
    assert all(kernel["sass"]["local"] == 0 for kernel in kernels if "sass" in kernel)


def test_the_end_of_a_step_waits_for_memory_once(kernels):
    """From the last load of the tensors to the new state, in kernels that latents launch.

    The sums of a chunk, the counter and the sums of the other chunks are on their way together:
    one atomic that is waited for, one that is not, and no fence, which would wait in between.
    Threads exchange both sums of their chunk at one barrier.
    """
    seen = [kernel for kernel in kernels if "sass" in kernel and usual(kernel["case"])]
    seen = [kernel for kernel in seen if kernel["case"]["kind"][1] == "paper"]
    assert {kernel["architecture"] for kernel in seen} >= {90} and len(seen) >= 4
    for kernel in seen:
        found = {name: kernel["sass"][name] for name in ("fences", "waited", "sent", "barriers")}
        assert found["fences"] == 0 and found["waited"] == found["sent"] == 1, kernel
        early = kernel["case"]["noise"] == "given"  # one that keeps loads in order
        assert found["barriers"] <= 5 + early, kernel


def test_the_tensors_of_one_block_are_read_before_the_numbers_of_a_step(kernels):
    """With given noise: the row waits for the step index, and may not be waited for before."""
    seen = [kernel for kernel in kernels if "sass" in kernel and usual(kernel["case"])]
    seen = [kernel for kernel in seen if kernel["case"]["noise"] == "given"]
    assert len(seen) >= 4
    for kernel in seen:
        # The state is at an address that nothing has to be read for.
        assert kernel["sass"]["numbers before tensors"] <= 1, kernel


# What instructions of a normal do, by their names; the rest moves and steers.
CLASSES = {
    "products of integers": "IMAD",
    "sums and bits of integers": "IADD3?|LOP3|SHF|LEA|VIADD",
    "products and sums of floats": "FFMA2?|FMUL2?|FADD2?",
    "conversions": "I2FP?|F2FP?",
    "choices": "FSEL|SEL|ISETP",
    "square roots": "MUFU",
    "once a warp": "U[A-Z0-9]+|R2UR|S2UR",
}
# Before they were counted it took 42.2 to 45.2, by architecture and dtype.
MOST_A_NORMAL = 0.9 * 42.2


def test_a_normal_of_a_seed_takes_a_tenth_fewer_instructions_than_it_did(printed):
    """And no more products than the words need.

    Ten rounds of two products, with all 64 bits of a result in one instruction, make four normals;
    one round is of numbers that are the same for all threads, or nearly.
    """
    (counts,) = [line["normals"] for line in printed if "normals" in line]
    assert {(count["architecture"], count["dtype"]) for count in counts} == {
        (architecture, dtype) for architecture in ARCHITECTURES for dtype in ("fp32", "bf16")
    }
    for count in counts:
        classes = count["classes"]
        assert sum(classes.values()) <= MOST_A_NORMAL, count
        assert 4 <= classes["products of integers"] <= 5.5, count
        assert classes["square roots"] == 0.5, count


# ---------------------------------------------------------------- the program that compiles


def launch(
    kind, cfg, clip, drift, divergence, noise, shape, channels_last, dtypes, outputs, aligned
):
    """What a call hands to the kernel, by the names of its arguments."""
    from dng_kernels import StepPlan, dng_step, guide, update_posterior
    from dng_kernels import noise_keys as keys_of
    from dng_math import (
        CRG,
        DDIM,
        DDPM,
        ClassifierFreeGuidance,
        ContrastiveCFG,
        DynamicNegativeGuidance,
        FeedbackGuidance,
        GeoGuide,
        LogOddsTracker,
        NegativePrompting,
        NoiseSchedule,
        PaperTracker,
        PerpNeg,
        SafeLatentDiffusion,
    )

    operation, name = kind
    rule = {
        "np": NegativePrompting(2.0),
        "paper": DynamicNegativeGuidance(1.0, PaperTracker(prior=0.1, divergence=divergence)),
        "log_odds": DynamicNegativeGuidance(1.0, LogOddsTracker(prior=0.1, divergence=divergence)),
        "cfg": ClassifierFreeGuidance(3.0),
        "fbg": FeedbackGuidance(),
        "sld": SafeLatentDiffusion(),
        "contrastive": ContrastiveCFG(),
        "perp_neg": PerpNeg(),
        "geoguide": GeoGuide(),
        "sld_led": SafeLatentDiffusion(reference="unconditional"),
        "contrastive_led": ContrastiveCFG.published(),
        "crg": CRG(),
        "weighted": DynamicNegativeGuidance(1.0, PaperTracker(prior=0.1)),
    }[name]
    coefficients = NoiseSchedule.linear(10).coefficients(DDIM(0.5) if drift else DDPM())
    plan = StepPlan(
        coefficients,
        rule,
        cfg_scale=3.0 if cfg else None,
        clip=1.0 if clip else None,
        weighted=name == "weighted",
        _warn=False,  # a step is compared with a step, whatever its posterior is worth
    )
    step = 9 if noise == "none" else 2  # the last one adds no noise
    batch = 1 if noise == "none" else 2
    if not aligned:
        shape = (3, shape[1] - 1, shape[2] - 1)
    wide = getattr(torch, "float32" if dtypes == "mixed" else dtypes)
    narrow = torch.bfloat16 if dtypes == "mixed" else wide

    def event(dtype):
        tensor = torch.empty(batch, *shape, dtype=dtype)
        return tensor.to(memory_format=torch.channels_last) if channels_last else tensor

    arguments = {"eps": event(narrow), "eps_neg": event(narrow), "state": plan.init_state(batch)}
    if operation != "guide":
        arguments["x"] = event(wide)
    if operation == "update":
        arguments["x_next"] = event(wide)
    else:
        arguments["eps_uncond"] = event(narrow) if plan.needs_uncond else None
        arguments["eps_pos"] = event(narrow) if plan.needs_positive else None
        arguments["momentum"] = plan.init_momentum(event(wide))
        arguments["return_scale"] = outputs
    if operation != "guide" and plan.needs_divergence:
        arguments["divergence_gap"] = torch.empty(batch)
    if operation == "step":
        arguments["return_guided"] = outputs
        arguments |= {
            "none": {},
            "given": {"noise": event(wide)},
            "seed": {"seed": 5, "first_sample": 3},
            "wide seed": {"seed": 2**64 - 1, "first_sample": 2**40 + 1},
            "keys": {"seed": keys_of(3, batch)},
        }[noise]
    caught = []
    fused.run = lambda *values: caught.append(fused.arguments(*values))
    public = {"step": dng_step, "guide": guide, "update": update_posterior}[operation]
    public(plan, step, **arguments, backend="triton")
    ((_, named),) = caught
    return named


def source_of(named):
    """The specialization that a launch with these arguments would compile.

    Triton's rules: None, constexpr and integers equal to 1 are constants; pointers and integers
    that 16 divides are known to be; unless a parameter says that it is not to be specialized.
    """
    from triton.compiler import ASTSource

    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    names |= {torch.int32: "i32", torch.int64: "i64"}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(fused.fused_step.params):
        name, value = parameter.name, named[parameter.name]
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (free and type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + names[value.dtype]
            divisible = value.data_ptr() % 16 == 0
        else:
            fits = "i32" if -(2**31) <= value < 2**31 else "i64"
            signature[name] = parameter.annotation_type or fits
            divisible = value % 16 == 0
        if free and divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fused.fused_step, signature=signature, constexprs=constants, attrs=attributes)


EVENTS = re.compile(
    "x|x_next_in|eps|eps_neg|eps_third|noise|momentum|x_next|guided_out|momentum_out"
)


def expected_accesses(named):
    """Accesses of 16 bytes by which a block of every tensor is read, and written.

    Rules that need sums first read the predictions in two places of the program.
    """
    from dng_kernels.plan import NEED_SUMS, UPDATE
    from dng_math._codes import PERPENDICULAR, REGULATED

    tensors = {
        name: named["BLOCK"] * value.itemsize // (16 * THREADS)
        for name, value in named.items()
        if EVENTS.fullmatch(name) and value is not None
    }
    written = ("x_next", "guided_out", "momentum_out")
    twice = ()
    if named["MODE"] != UPDATE and named["RULE"] in NEED_SUMS:
        twice = ("eps", "eps_neg")
        if named["RULE"] in (PERPENDICULAR, REGULATED) or named["READS_THIRD"]:
            twice = (*twice, "eps_third")
    loads = sum(count for name, count in tensors.items() if name not in written)
    loads += sum(count for name, count in tensors.items() if name in twice)
    return loads, sum(count for name, count in tensors.items() if name in written)


def tool_for(kernel, folder):
    """What reads a compiled kernel: cuobjdump, called with its options."""
    cubin = folder / f"{os.getpid()}.cubin"
    cubin.write_bytes(kernel.asm["cubin"])

    def tool(*arguments):
        command = [TOOLS / "cuobjdump", *arguments, cubin]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    return tool


@triton.jit
def only_normals(
    out,
    seed: tl.int64,
    sample: tl.int64,
    tag: tl.int64,
    TOGETHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    z = fused.normals(seed, sample, tag, first, 0, 1, False, TOGETHER, BLOCK)
    tl.store(out + first + tl.arange(0, BLOCK), z.to(out.dtype.element_ty))


def instructions_of_a_normal(folder):
    """By architecture and dtype, of programs that make 16 normals a thread and write them."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    counts = []
    for architecture, dtype in itertools.product(ARCHITECTURES, ("fp32", "bf16")):
        constants = {"TOGETHER": 8 if dtype == "bf16" else 4, "BLOCK": 16 * THREADS}
        signature = {"out": "*" + dtype} | dict.fromkeys(("seed", "sample", "tag"), "i64")
        source = ASTSource(
            only_normals,
            signature=signature | dict.fromkeys(constants, "constexpr"),
            constexprs=constants,
            attrs={(0,): [["tt.divisibility", 16]]},
        )
        target = GPUTarget("cuda", architecture, 32)
        kernel = triton.compile(source, target=target, options={"enable_fp_fusion": True})
        code = tool_for(kernel, folder)("-sass")
        found = re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([A-Z][A-Z0-9]+)", code)
        found = found[: len(found) - found[::-1].index("EXIT")]  # what follows is padding
        classes = {
            name: sum(bool(re.fullmatch(names, one)) for one in found) / 16
            for name, names in CLASSES.items()
        }
        classes["others"] = len(found) / 16 - sum(classes.values())
        counts.append({"architecture": architecture, "dtype": dtype, "classes": classes})
    return counts


def compile_one(case, architecture, disassemble, folder):
    from triton.backends.compiler import GPUTarget

    named = launch(**case)
    options = fused.options(named)
    kernel = triton.compile(
        source_of(named), target=GPUTarget("cuda", architecture, 32), options=options
    )
    tool = tool_for(kernel, folder)
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", tool("-res-usage"))
    accesses = {}
    for access, vector, bits in re.findall(
        r"\b(ld|st)\.global(?!\.cg)(?:\.[a-z0-9_:]*)*?(?:\.v(\d))?\.b(\d+)\b", kernel.asm["ptx"]
    ):
        size = f"{access}{int(vector or 1) * int(bits)}"
        accesses[size] = accesses.get(size, 0) + 1
    result = {
        "case": case,
        "architecture": architecture,
        "block": named["BLOCK"],
        "registers": int(usage[1]),
        "stack": int(usage[2]),
        "local": int(usage[4]),
        "expected": expected_accesses(named),
        "accesses": accesses,
        "fusion": kernel.metadata.enable_fp_fusion,
        "warps": kernel.metadata.num_warps,
        "options": options,
    }
    if disassemble:
        code = tool("-sass")
        patterns = {
            "ld128": r"\bLDG\.E\.128\b(?!\.STRONG)",
            "st128": r"\bSTG\.E\.128\b",
            "local": r"\b(?:LDL|STL)\b",
            "fused": r"\bFFMA2?\b",
            "fences": r"\bMEMBAR\b|\bCCTL\b",
            "waited": r"\bATOMG?\b",
            "sent": r"\bREDG?\b",
            "barriers": r"\bBAR\.SYNC\b",
        }
        result["sass"] = {name: len(re.findall(p, code)) for name, p in patterns.items()}
        until_last = code[: code.rfind("LDG.E.128 ")]
        result["sass"]["numbers before tensors"] = len(re.findall(r"\bLDG\.E ", until_last))
    return result


def hashes_of_numbers():
    """Of the specializations for calls that differ in numbers alone, by the keys of Triton."""
    case = dict.fromkeys(("cfg", "clip", "drift", "divergence", "channels_last", "outputs"), False)
    case |= {"shape": (4, 64, 64), "dtypes": "float32", "aligned": True}
    named = launch(kind=("step", "paper"), noise="seed", **case)
    numbers = [
        {"seed": seed, "first_sample": first, "batch": batch}
        for seed in (0, 1, 5, 16, -1, 2**62)
        for first in (0, 1, 16, 2**40)
        for batch in (1, 2, 3, 16)
    ]
    sources = [source_of(named | change) for change in numbers]
    return [str((source.signature, source.constants, source.attrs)) for source in sources]


def main(part, folder, which):
    """Compile every PROCESSES-th variant; one line of JSON each."""
    if part == "0":
        print(json.dumps({"specializations": len(set(hashes_of_numbers()))}), flush=True)
    else:
        print(json.dumps({"normals": instructions_of_a_normal(Path(folder))}), flush=True)
    work = [(case, sm) for sm, cases in variants(which).items() for case in cases]
    for i, (case, architecture) in list(enumerate(work))[int(part) :: PROCESSES]:
        # A disassembler takes longer than the compiler: of some, and the rest from what it read.
        disassemble = usual(case) or (i % 8 == 0 and case["aligned"])
        print(json.dumps(compile_one(case, architecture, disassemble, Path(folder))), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(*sys.argv[1:])
    else:
        with tempfile.TemporaryDirectory() as place:
            for count in instructions_of_a_normal(Path(place)):
                print(f"sm_{count['architecture']}, {count['dtype']}:")
                print(f"{sum(count['classes'].values()):8.2f}  instructions of a normal")
                for name, number in count["classes"].items():
                    print(f"{number:8.2f}  {name}")
