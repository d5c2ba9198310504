"""Negative prompts of job lines."""

import numpy as np
import pytest

from cogview.jobs.plan import JobPlan, JobSettings
from cogview.jobs.records import JobRecord, digest

FOX, DOG = "一只狐狸", "红色背景上的一只狗"
GUIDED = {"guidance": 2.0}


def plan_of(model, tmp_path, *records):
    """Return the plan of a job of ``records``."""
    return JobPlan(model, JobSettings(source="job.jsonl", output=tmp_path, seed=7), records)


def test_job_line_generates_with_its_negative_prompt(tiny_model, tmp_path):
    """A negative prompt makes another record: its images are counted by themselves, as those of another prompt."""
    records = [
        JobRecord(number=1, prompt=FOX, sampling=GUIDED),
        JobRecord(number=2, prompt=FOX, negative=DOG, sampling=GUIDED),
        JobRecord(number=3, prompt=FOX, negative=DOG, sampling=GUIDED),
    ]
    requests = [request for item in plan_of(tiny_model, tmp_path, *records).items() for request in item.requests]
    assert [(request.negative, request.index) for request in requests] == [("", 0), (DOG, 0), (DOG, 1)]
    images = list(tiny_model.run(requests))
    expected = tiny_model.generate(FOX, n=2, seed=7, negative=DOG, **GUIDED)
    for image, one in zip(images[1:], expected, strict=True):
        np.testing.assert_array_equal(image.codes, one.codes)


def test_job_plan_refuses_a_negative_prompt_without_guidance(tiny_model, tmp_path):
    plan = plan_of(tiny_model, tmp_path, JobRecord(number=1, prompt=DOG), JobRecord(number=2, prompt=FOX, negative=DOG))
    assert [str(problem) for problem in plan.problems] == [
        "line 2: a negative prompt has no effect without guidance: set guidance to another value than 1"
    ]


def test_job_record_refuses_a_negative_prompt_of_another_task(tmp_path):
    with pytest.raises(
        ValueError, match="negative means nothing for the task upscale; it belongs to: generate, complete"
    ):
        JobRecord(number=1, task="upscale", prompt=FOX, negative=DOG, image=tmp_path / "a.png")


def test_digest_of_a_job_without_negative_prompts_is_unchanged():
    plain, negative = (JobRecord(number=1, prompt=FOX, negative=text) for text in (None, DOG))
    assert digest([plain], "job.jsonl") == "8ff0beaf92b7fc67c343c9417b5083c4c3725939608e5dc0a142aea304af2b1e"
    assert digest([negative], "job.jsonl") != digest([plain], "job.jsonl")
