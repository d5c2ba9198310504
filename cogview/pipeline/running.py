"""A model that runs generation requests: checked, completed and decoded in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from cogview.errors import InputError
from cogview.modeling.config import Sampling
from cogview.pipeline import runner
from cogview.pipeline.image_codes import check_codes
from cogview.pipeline.inputs import describe, require_callback
from cogview.pipeline.requests import GenerationRequest, Prompt, check_changes
from cogview.pipeline.results import Caption, GeneratedImage, GenerationProgress, ProgressCallback
from cogview.pipeline.scoring import ScoringModel
from cogview.tokenizers.tasks import TASKS


class RunningModel(ScoringModel):
    """A loaded model that also runs requests; its methods are those of ``CogView``."""

    def run(
        self,
        requests: Iterable[GenerationRequest],
        *,
        batch_size: int | None = None,
        callback: ProgressCallback | None = None,
    ) -> Iterator[GeneratedImage | Caption]:
        """Generate what is requested; different tasks share batches.

        Arguments are checked at once; the work starts with the first result that is taken.

        Args:
            requests: The requests.
            batch_size: Maximum number of requests at a time, from 1; None: as many as memory holds and pay.
            callback: Called with a ``GenerationProgress`` after every line of codes. Where it returns False, the
                iterator ends.

        Returns:
            An iterator over images and captions in the order of the requests, as batches are finished.

        Raises:
            InputError: If the weights were not trained for a task, or a prompt, codes or a setting cannot be used.

        Examples:
            >>> cat = GenerationRequest(prompt="一只猫", seed=1, sampling=Sampling(top_k=20))
            >>> caption = GenerationRequest(task="caption", seed=1, codes=model.encode_images("apple.png"))
            >>> [type(result).__name__ for result in model.run([cat, caption])]
            ['GeneratedImage', 'Caption']
        """
        require_callback(callback)
        given = list(requests) if isinstance(requests, Iterable) else requests
        resolved, context = self._resolve(given), self.context
        originals = dict(zip(resolved, given, strict=True))

        def report(progress: GenerationProgress) -> object:
            """Report progress with the requests of the caller, which may have been completed."""
            assert callback is not None
            return callback(replace(progress, requests=tuple(originals.get(one, one) for one in progress.requests)))

        return runner.run_requests(resolved, context, context.planner(batch_size), callback and report)

    def batch_sizes(self, requests: Iterable[GenerationRequest], *, batch_size: int | None = None) -> list[int]:
        """Return the sizes of the batches in which ``run`` would take the requests now, in order.

        Args:
            requests: The requests.
            batch_size: Maximum number of requests at a time, from 1; None plans it by memory.

        Raises:
            InputError: As ``run`` does.

        Examples:
            >>> requests = [GenerationRequest(prompt="一只猫", seed=1, index=index) for index in range(6)]
            >>> model.batch_sizes(requests, batch_size=4)
            [3, 3]
        """
        resolved, context = self._resolve(requests), self.context
        return runner.RequestQueue(resolved, context).batch_sizes(context.planner(batch_size))

    def check_negative(self, sampling: Sampling, task: str = "generate") -> None:
        """Check that images can be led away from a negative prompt.

        Args:
            sampling: Sampling settings.
            task: Task of the images.

        Raises:
            InputError: The task takes none, the weights cannot be guided, or the settings do not guide.

        Examples:
            >>> model.check_negative(model.sampling(guidance=2))
        """
        if TASKS[task].weights != "generate":
            raise InputError(f"a negative prompt means nothing for the task {task!r}; it belongs to: generate")
        if not self._config(task).caption_dropout:
            raise InputError(
                f"{self.name} was trained without caption dropout, so it cannot be guided and takes no negative prompt"
            )
        if sampling.guidance == 1:
            raise InputError("a negative prompt has no effect without guidance: set guidance to another value than 1")

    def tokenize_negative(self, negative: str, sampling: Sampling) -> Prompt:
        """Return a checked negative prompt of the task ``generate`` with its piece ids.

        Args:
            negative: The text.
            sampling: Sampling settings.

        Raises:
            InputError: As ``check_negative`` and ``tokenize`` do.

        Examples:
            >>> model.tokenize_negative("苹果", model.sampling(guidance=2)).text
            '苹果'
        """
        self.check_negative(sampling)
        (checked,) = self.tokenize([negative])
        self.prompt_checks.log_warnings([checked])
        return checked

    def _resolve(self, requests: Iterable[GenerationRequest]) -> list[GenerationRequest]:
        """Return checked requests, each with sampling settings, piece ids and int64 codes; InputError for bad ones."""
        if isinstance(requests, GenerationRequest) or not isinstance(requests, Iterable):
            raise InputError(f"requests must be a list of GenerationRequest, got {describe(requests)}")
        given = list(requests)
        for number, request in enumerate(given):
            if not isinstance(request, GenerationRequest):
                raise InputError(f"requests[{number}] must be a GenerationRequest, got {describe(request)}")
        for task in dict.fromkeys(request.task for request in given):
            if task in TASKS and (TASKS[task].output == "ranking" or not TASKS[task].blank_name):
                raise InputError(f"the task {task!r} generates nothing; call rerank or score")
            self.require_task(task)
        pieces: dict[str, tuple[int, ...]] = {}
        resolved = []
        for number, one in enumerate(given):
            changes: dict[str, Any] = {}
            if one.sampling is None:
                changes["sampling"] = self._config(one.task).sampling_of(one.task)
            if one.prompt_ids is None and "prompt" in TASKS[one.task].inputs:
                if one.prompt not in pieces:
                    pieces[one.prompt] = self.tokenize([one.prompt])[0].ids
                changes["prompt_ids"] = pieces[one.prompt]
            if one.negative and one.negative_ids is None:
                if one.negative not in pieces:
                    pieces[one.negative] = self.tokenize([one.negative])[0].ids
                changes["negative_ids"] = pieces[one.negative]
            if one.codes is not None:
                codes = check_codes(one.codes, self.vocabulary.num_image_codes, f"requests[{number}].codes")
                if codes is not one.codes:
                    changes["codes"] = codes
            check_changes(one, self.config.grid, f"requests[{number}]")
            resolved.append(replace(one, **changes) if changes else one)
        for task, sampling in {(one.task, one.sampling) for one in resolved}:
            assert sampling is not None
            self._check_guidance(sampling, task)
        for task, sampling in {(one.task, one.sampling) for one in resolved if one.negative}:
            assert sampling is not None
            self.check_negative(sampling, task)
        return resolved
