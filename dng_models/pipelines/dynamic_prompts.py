"""Negatives that are chosen by what looks at the images: VL-DNP (arXiv 2510.26052).

At a few steps the clean images that the prediction without a negative implies are shown to
something that can tell what is in them.  What it names is pushed away until it is asked again, and
where it names nothing no negative is evaluated.

The published method makes one negative prompt of all concepts that were found.  Here every concept
has a prediction of its own, and the push is away from the mean of those that are held:
``base - g mean_k (eps_k - reference)``.  With a single concept the two are the same.  With several
the strength stays g, as that of one prompt that names them all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from dng_math import checks
from dng_math.rules import (
    ASKED_AT,
    ASKED_OF,
    REFERENCES,
    LimitedInterval,
    NegativePrompting,
    Reference,
    Rule,
    asked_steps,
    checked_steps,
)
from dng_models.pipelines.decoding import ImageDecoder
from dng_models.pipelines.trace import Question, RunTrace

Ask = Callable[[Any, int], Sequence[Iterable[str]]]
OnError = Literal["raise", "keep"]
ON_ERROR: tuple[OnError, ...] = get_args(OnError)


@dataclass(frozen=True, eq=False)
class DynamicPrompts:
    """Push away what is seen in the images, as long as it is: a rule for ``apply_guidance``.

    ``guided = base - g mean_k (eps_k - reference)`` over the concepts k that the image showed when
    it was last looked at (VL-DNP, arXiv 2510.26052); base is the prediction without a negative.
    An image that shows none of them has the base, and no negative is evaluated for it.
    :class:`dng_math.AskedNegative` is this rule on exact mixtures, for one concept.

    Parameters
    ----------
    ask : callable
        ``ask(images, step)`` returns, for every image, the names of the concepts that it shows: a
        sequence of sequences of str, empty for none.  ``images`` are what ``decode`` returns, PIL
        images by default, and ``step`` is the index of the scheduler's step, 0 the noisiest.
        :class:`dng_models.ClipJudge` and :class:`dng_models.VisionLanguageJudge` are such
        callables.
    concepts : sequence of str or mapping, optional
        The concepts' names, which are the negative prompts too; or a mapping from names to
        negative prompts (texts or embeddings as ``apply_guidance`` takes them in
        ``negative_prompts``, or numbers of classes).  None: ``ask.concepts``.
    guidance_scale : float
        g, finite; the published w_neg, from 7.5 to 15.
    reference : {"positive", "unconditional"}, optional
        What the negatives are measured from.  None: the unconditional prediction, as published,
        where classifier-free guidance beneath makes it (``cfg_scale``), and else the positive one.
    at : sequence of int
        Steps at which ``ask`` is asked.
    of : int, optional
        Number of steps that ``at`` is for: of N steps, step ``at N // of`` asks.  None: the steps
        themselves, whatever their number.
    decode : callable, optional
        Maps predictions of x0, shape (B, ...), in the scheduler's units, to B images.  None: the
        pipeline's VAE, to PIL images; where there is no VAE the latents are the pixels.
    on_error : {"raise", "keep"}
        What to do if decoding fails, ``ask`` raises, or it answers for another number of images or
        with something that is no concept: "raise" ends the run, and "keep" warns once a run, holds
        what was held before, and notes the error in the trace.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and what is allowed.

    Examples
    --------
    >>> judge = ClipJudge("openai/clip-vit-large-patch14", ["egg", "sausage"])
    >>> with apply_guidance(pipe, DynamicPrompts(judge), cfg_scale=7.5) as trace:
    ...     image = pipe("A British breakfast").images[0]
    >>> for question in trace.questions:
    ...     print(question.step, question.shown)
    """

    ask: Ask
    concepts: Sequence[str] | Mapping[str, Any] | None = None
    guidance_scale: float = 7.5
    reference: Reference | None = None
    at: Sequence[int] = ASKED_AT
    of: int | None = ASKED_OF
    decode: Callable[[Tensor], Any] | None = None
    on_error: OnError = "raise"
    needs_positive: ClassVar[bool] = False
    several_concepts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.ask, type) or not callable(self.ask):
            raise TypeError(f"ask must be a callable (images, step), got {checks.shown(self.ask)}")
        concepts = getattr(self.ask, "concepts", None) if self.concepts is None else self.concepts
        object.__setattr__(self, "concepts", _checked_concepts(concepts))
        checks.finite("guidance_scale", self.guidance_scale)
        if self.reference is not None:
            checks.choice("reference", self.reference, REFERENCES)
        if self.of is not None:
            checks.integer("of", self.of, 1)
        object.__setattr__(self, "at", checked_steps(self.at, self.of))
        if self.decode is not None and not callable(self.decode):
            raise TypeError(
                f"decode must be a callable from latents to images, or None, got {self.decode!r}"
            )
        checks.choice("on_error", self.on_error, ON_ERROR)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the concepts, which answers are made of."""
        assert self.concepts is not None
        return tuple(self.concepts)

    @property
    def prompts(self) -> list[Any]:
        """The negative prompt of each concept: a text, embeddings, or the number of a class."""
        given = self.concepts
        return list(given.values()) if isinstance(given, Mapping) else list(given or ())

    @property
    def push(self) -> NegativePrompting:
        """The push away from whatever is held; what it is measured from, the chain decides."""
        return NegativePrompting(self.guidance_scale)

    def asked_at(self, steps: int) -> frozenset[int]:
        """The steps of a run of so many steps at which ``ask`` is asked."""
        return asked_steps(self.at, self.of, steps)

    def init(self, n: int, dimensions: int) -> None:
        """None: what is held belongs to a run of a pipeline."""

    def guide(self, predictions: Any, memory: Any) -> Any:
        """Refuse: only a pipeline has images that can be looked at.

        Raises
        ------
        TypeError
            Always.
        """
        raise TypeError(
            "rule must be one that needs predictions only, and DynamicPrompts looks at images: "
            "dng_models.apply_guidance(pipe, rule) guides a pipeline by it"
        )

    def read(self, answers: Any, images: int) -> list[tuple[str, ...]]:
        """What ``ask`` answered, checked: the names for each image, in the order of the concepts.

        Parameters
        ----------
        answers : sequence of iterables of str
            One for each image.
        images : int
            Number of images.

        Raises
        ------
        ValueError, TypeError
            If there are more or fewer, or a name is no concept's.
        """
        if isinstance(answers, str) or not isinstance(answers, Sequence):
            raise TypeError(
                "ask must return a sequence with the names of the concepts of each image, got "
                f"{checks.shown(answers)}"
            )
        if len(answers) != images:
            raise ValueError(
                f"ask must return one answer for each of {images} images, got {len(answers)}"
            )
        found = []
        for image, answer in enumerate(answers):
            if isinstance(answer, str | Mapping) or not isinstance(answer, Iterable):
                raise TypeError(
                    "ask must return a sequence of names for each image, empty for none, got "
                    f"{checks.shown(answer)} for image {image}"
                )
            named = list(answer)
            unknown = [name for name in named if name not in self.names]
            if unknown:
                raise ValueError(
                    f"ask must return names of {', '.join(map(repr, self.names))}, got "
                    f"{checks.shown(unknown[0])} for image {image}"
                )
            found.append(tuple(name for name in self.names if name in named))
        return found


def checked_names(given: Any) -> tuple[str, ...]:
    """Names of concepts: one or more, each once, none of them empty."""
    if isinstance(given, str) or not isinstance(given, Sequence | Mapping):
        raise TypeError(
            f"concepts must be a sequence of names, or in a rule a mapping of names to negative "
            f"prompts, got {checks.shown(given)}"
        )
    names = tuple(given)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"concepts must have names that are str, got {checks.shown(name)}")
        if not name.strip():
            raise ValueError(f"concepts must have names that are not empty, got {name!r}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"concepts must be one or more, each once, got {checks.shown(names)}")
    return names


def _checked_concepts(given: Any) -> tuple[str, ...] | dict[str, Any]:
    """The names, or the prompts by their names."""
    if given is None:
        raise ValueError("concepts must be given where ask has no concepts of its own, got None")
    names = checked_names(given)
    return dict(given) if isinstance(given, Mapping) else names


def asking_rule(rule: Rule | Sequence[Rule]) -> DynamicPrompts | None:
    """The :class:`DynamicPrompts` of a rule, inside any limited intervals; None of another.

    Raises
    ------
    ValueError
        If it is in a list, as one of the rules of several concepts.
    """
    several = isinstance(rule, Sequence)
    given: list[Any] = list(rule) if isinstance(rule, Sequence) else [rule]
    found = [_inside(each) for each in given]
    if several and any(isinstance(each, DynamicPrompts) for each in found):
        raise ValueError(
            "rule must be DynamicPrompts itself, which has several concepts of its own, got "
            f"{checks.shown(rule)}"
        )
    return found[0] if not several and isinstance(found[0], DynamicPrompts) else None


def _inside(rule: Any) -> Any:
    """The rule inside any limited intervals."""
    while isinstance(rule, LimitedInterval):
        rule = rule.rule
    return rule


def with_decoder(rule: Any, pipe: Any) -> Any:
    """The rule, with the pipeline's own VAE to decode where it has no ``decode``.

    Raises
    ------
    ValueError
        If the pipeline is known to make no images.
    """
    if isinstance(rule, LimitedInterval):
        return replace(rule, rule=with_decoder(rule.rule, pipe))
    return replace(rule, decode=ImageDecoder(pipe)) if rule.decode is None else rule


class Questions:
    """The questions of one run, and what is held for each image since the last of them.

    Parameters
    ----------
    rule : DynamicPrompts
    steps : int
        Number of the scheduler's steps.
    record : RunTrace
        Where questions and answers are recorded.

    Attributes
    ----------
    held : Tensor, shape (M, B), bool, on the CPU, or None
        Which of M concepts is held for which of B images; None before the first question.
    """

    def __init__(self, rule: DynamicPrompts, steps: int, record: RunTrace) -> None:
        self._rule, self._record = rule, record
        self._open = set(rule.asked_at(steps))
        self._told = False
        self.held: Tensor | None = None

    def is_due(self, step: int) -> bool:
        """Whether the images of a step are to be looked at, and were not yet."""
        return step in self._open

    def holds(self, images: int) -> Tensor:
        """What is held, shape (M, B); nothing before the first question."""
        if self.held is None:
            return torch.zeros(len(self._rule.names), images, dtype=torch.bool)
        return self.held

    def put(self, x0: Tensor, step: int, time: float) -> None:
        """Show images to ``ask``, and hold what it answers.

        Parameters
        ----------
        x0 : Tensor, shape (B, ...)
            The predictions of the clean images, in the scheduler's units.
        step : int
            Index of the step.
        time : float
            Diffusion time of the step, for the trace.

        Raises
        ------
        Exception
            What decoding or ``ask`` raised, or as :meth:`DynamicPrompts.read`; with
            ``on_error="keep"`` a warning.
        """
        self._open.discard(step)
        rule, images = self._rule, len(x0)
        failed = None
        try:
            shown = x0 if rule.decode is None else rule.decode(x0)
            if len(shown) != images:
                raise ValueError(
                    f"decode must return one image for each of {images} latents, got {len(shown)}"
                )
            answers = rule.read(rule.ask(shown, step), images)
            self.held = torch.tensor(
                [[name in answer for answer in answers] for name in rule.names], dtype=torch.bool
            )
        except Exception as error:
            if rule.on_error == "raise":
                raise
            failed = f"{type(error).__name__}: {error}"
            self._tell(step, failed)
        held = self.holds(images)
        now = tuple(
            tuple(name for name, own in zip(rule.names, column, strict=True) if own)
            for column in held.T.tolist()
        )
        self._record.questions.append(Question(step, time, now, failed))

    def _tell(self, step: int, failed: str) -> None:
        if self._told:
            return
        self._told = True
        warnings.warn(
            f"the question at step {step} had no answer ({failed}): what was held before is held "
            "on, and so at every further question that fails",
            stacklevel=2,
        )
