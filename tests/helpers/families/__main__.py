"""Print docs/pipelines.md: which pipelines of diffusers can be guided, and what is tested.

python -m tests.helpers.families > docs/pipelines.md
"""

from __future__ import annotations

import diffusers

from dng_models.pipelines.layouts import LAYOUTS, REFUSED, Layout, standing
from tests.helpers.families import stock
from tests.helpers.families.walk import pipeline_classes

HEAD = """# Which pipelines can be guided

`apply_guidance(pipe, rule)` guides a pipeline of a class in this table, or of a subclass of one.
What it must know of a class (how its network is shown both prompts, latents and times) is a row
of `dng_models.pipelines.layouts.LAYOUTS`; the first call of a guided pipeline is compared with the
row, and what does not fit is refused with the reason. This page is printed by
`python -m tests.helpers.families` from that table and from diffusers {version}: {prompted} classes
with a negative prompt are guided, and {alone} that know of no prompt; {refused} are refused for a
reason of their own, and the rest take no negative prompt or are deprecated by diffusers itself.

Every mark is a test of `tests/models/pipelines/test_families.py` on a tiny pipeline of that class
with random weights:

- **stock**: guidance that does nothing gives the stock call, and a constant push the stock call's
  negative prompting, within 2e-5 (batches of other sizes are rounded otherwise);
- **CFG**: `cfg_scale=` beneath DNG at scale 0 gives the stock call without a negative prompt;
- **list**: `negative_prompts=[x]` gives what the pipeline's own `negative_prompt=x` gives, and
  several negatives work, by one rule or by a rule for each;
- **prior**: the positive prompt itself as what is unwanted leaves the posterior at its prior;
- **by hand**: DNG gives what a loop by hand around the scheduler's step gives, in float64, images
  and posteriors.

*calls*: whether the network sees both prompts in one batch or is called once for each. *control*:
a control network that sees added prompts too. *mask*: the pipeline overwrites a part of the
latents, so that `mask=` must say where a tracked posterior is to look (where it says "own", only
if the network was not made for inpainting). *LoRA*: the network with an adapter (PEFT's); – is a
network of diffusers that takes none. *IP*: an IP-Adapter was tried.
"""

OWN_LAYOUT = """
## A layout of your own

A class that is in no table is refused until its layout is declared:

```python
from dng_math import DynamicNegativeGuidance
from dng_models import apply_guidance
from dng_models import Layout

layout = Layout(
    network=("transformer",),  # pipe.transformer is called once a step, on a doubled batch,
    first="negative",  # whose first half is the negative prompt's;
    text=("encoder_hidden_states", "encoder_attention_mask"),  # these depend on the prompt
    latents="hidden_states",
    time="timestep",  # which is the scheduler's
)
with apply_guidance(pipe, DynamicNegativeGuidance.tracked(18, prior=0.05), layout=layout):
    images = pipe(...).images
```

The first call checks it: another negative prompt must change the rows that the layout says and
nothing else, the time must be the scheduler's, and the scheduler must be given what guidance
made. `Layout`'s docstring lists what else can be said.
"""


def main() -> None:
    alone = sum(layout.calls == "alone" for layout in LAYOUTS.values())
    print(
        HEAD.format(
            version=diffusers.__version__,
            prompted=len(LAYOUTS) - alone,
            alone=alone,
            refused=len(REFUSED),
        )
    )
    columns = "calls", "stock", "CFG", "list", "prior", "by hand", "control", "mask", "LoRA", "IP"
    print(f"| class | makes | {' | '.join(columns)} |")
    print(f"|---|---|{'|'.join([':-:'] * len(columns))}|")
    for name in sorted(LAYOUTS):
        print(f"| {' | '.join((name, *row(name, LAYOUTS[name])))} |")
    print("\n`unwanted=` takes the place of prompts for classes that know of none (calls: alone).")
    why = [f"{n}... ({reason})" for n, reason in stock.NOT_ALIKE.items()]
    print(
        "Prior is not to be had where diffusers shows the two prompts with other conditions: ",
        end="",
    )
    print("; ".join(why) + ".")
    print(OWN_LAYOUT)
    print("## Refused\n\n| class | because |\n|---|---|")
    for name in sorted(REFUSED):
        print(f"| {name} | {REFUSED[name]} |")
    rest = {n: standing(kind) for n, kind in pipeline_classes().items()}
    rest = {n: found for n, found in rest.items() if n not in LAYOUTS and n not in REFUSED}
    without = [
        n for n, found in rest.items() if str(found).startswith("its call takes no negative")
    ]
    deprecated = [
        n for n, found in rest.items() if str(found).startswith("diffusers has deprecated")
    ]
    print("\nThey take no negative prompt: " + ", ".join(without) + ".")
    print(
        "\ndiffusers has deprecated them, and they were not tried: " + ", ".join(deprecated) + "."
    )


# Outputs and inputs of a class by words in its name; the first match counts.
MAKES = {
    "video of an image": "ImageToVideo Image2Video I2V TI2VA ConsisID Framepack",
    "video of a video": "VideoToVideo VACE WanAnimate FunControl LucyEdit Transfer",
    "inpainting": "Inpaint",
    "image of an image": "Img2Img Edit Kontext Refiner I2I Upscale SuperRes Depth2Img ChronoEdit",
    "video": "Video AnimateDiff Latte Allegro Mochi LTX Wan SkyReels Helios Cosmos EasyAnimate T2V "
    "AnyFlow",
    "sound": "Audio",
}


def makes(name: str) -> str:
    """What a class makes, such as "video of an image", from its name."""
    found = (what for what, words in MAKES.items() if any(w in name for w in words.split()))
    return next(found, "image")


def row(name: str, layout: Layout) -> tuple[str, ...]:
    """The cells of a class in the table."""
    yes, no = "✓", "–"
    if layout.calls == "alone":
        by_hand = yes if name == "DDPMPipeline" else no  # in tests/models/pipelines/test_hook.py
        return (makes(name), layout.calls, yes, no, no, yes, by_hand, no, no, no, no)
    by_text = layout.negatives is None and layout.labels is None and not stock.only_embeddings(name)
    return (
        makes(name),
        layout.calls,
        yes,
        yes if by_text or layout.labels else no,
        yes if by_text or name == "KandinskyV22Pipeline" else no,
        yes if (by_text and not name.startswith(tuple(stock.NOT_ALIKE))) or layout.labels else no,
        no if layout.labels or name in stock.REARRANGED else yes,
        yes if layout.control else no,
        {False: no, True: "own", "always": "always"}[layout.overwrites],
        no if name.startswith(stock.NO_LORA) else yes,
        yes if name in stock.IP_ADAPTER else no,
    )


if __name__ == "__main__":
    main()
