"""Decoding programs: what is pending, how they advance, and that a prompt is tokenized and arranged once."""

import numpy as np
import pytest

from cogview.generation.requests import DecodingResult
from cogview.generation.sampling import noise_stream
from cogview.modeling.config import GREEDY, Sampling
from cogview.pipeline.programs import ProgramBuilder
from cogview.pipeline.requests import GenerationRequest
from cogview.tokenizers.layouts import Layout
from cogview.tokenizers.text import TextTokenizer

PROMPTS = ["狐狸", "一只狐狸在汽车的左边", "蓝色背景上的三只狗"]
GUIDED = Sampling(guidance=3.0)


@pytest.fixture
def calls(monkeypatch):
    """Count the texts that are tokenized and the sequences that are arranged."""
    counts = {"encode": [], "arrange": []}
    encode, arrange = TextTokenizer.encode, Layout.arrange

    def counted_encode(self, text):
        counts["encode"].append(text)
        return encode(self, text)

    def counted_arrange(self, *given, **values):
        counts["arrange"].append(self.name)
        return arrange(self, *given, **values)

    monkeypatch.setattr(TextTokenizer, "encode", counted_encode)
    monkeypatch.setattr(Layout, "arrange", counted_arrange)
    return counts


@pytest.mark.parametrize("batch_size", [None, 2])
def test_generate_tokenizes_and_arranges_prompt_once(tiny_model, calls, batch_size):
    """Validation, memory planning and decoding share one tokenization and one sequence for all images of a prompt."""
    tiny_model.generate(PROMPTS, n=3, seed=7, batch_size=batch_size)
    assert calls == {"encode": PROMPTS, "arrange": ["generate"] * 3}


def test_guided_generate_arranges_two_sequences_of_prompt(tiny_model, calls):
    """With the text and without it."""
    tiny_model.generate(PROMPTS[0], n=3, seed=7, sampling=GUIDED)
    assert calls == {"encode": PROMPTS[:1], "arrange": ["generate"] * 2}


def test_run_tokenizes_prompt_of_consecutive_requests_once(tiny_model, calls):
    """Requests that bring no piece ids, as those of a job."""
    requests = [GenerationRequest(prompt=prompt, seed=7, index=i) for prompt in PROMPTS for i in range(2)]
    sizes = tiny_model.batch_sizes(requests)
    assert calls["encode"] == PROMPTS
    assert sizes == [6]


def test_single_step_program_ends_after_one_result(tiny_model):
    """Its output is the blank image of the sequence."""
    request = GenerationRequest(prompt=PROMPTS[0], seed=7, index=2, sampling=GREEDY)
    program = ProgramBuilder(tiny_model.context).build(request)
    (step,) = program.pending()
    prompt_ids = tiny_model.text_tokenizer.encode(PROMPTS[0])
    assert (step.seed, step.image, step.unconditional) == (7, noise_stream(2, prompt_ids, version=2), None)
    ids = step.sequence.ids.copy()
    ids[step.sequence.spans["image"]] = np.arange(64)
    program.advance([DecodingResult(ids=ids, log_probability=-2.5)])
    assert program.pending() == []
    np.testing.assert_array_equal(program.output, np.arange(64).reshape(8, 8))
    assert program.log_probability == -2.5


def test_upscale_program_advances_by_windows(tiny_model):
    """Nine windows in seven steps; noise is keyed by the index of a code in the large image."""
    codes = np.arange(64).reshape(8, 8)
    request = GenerationRequest(prompt=PROMPTS[0], seed=7, task="upscale", codes=codes, sampling=GUIDED)
    program = ProgramBuilder(tiny_model.context).build(request)
    counts, keys = [], []
    while steps := program.pending():
        counts.append(len(steps))
        results = []
        for step in steps:
            span = step.sequence.spans["image"]
            blanks = step.sequence.blanks[span]
            keys += step.noise_positions[span][blanks].tolist()
            ids = step.sequence.ids.copy()
            ids[span] = np.where(blanks, step.noise_positions[span] - 64, ids[span])
            results.append(DecodingResult(ids=ids, log_probability=-1.0))
            assert len(step.unconditional) == len(step.sequence) - 2
        program.advance(results)
    assert counts == [1, 1, 2, 2, 1, 1, 1]
    assert sorted(keys) == list(range(64, 64 + 256))
    np.testing.assert_array_equal(program.output, np.arange(256).reshape(16, 16))
    assert program.log_probability == -9.0


def test_upscale_program_refuses_request_without_codes(tiny_model):
    """A request that was not built by ``upscale``."""
    request = GenerationRequest(prompt=PROMPTS[0], seed=7, task="upscale", sampling=GREEDY)
    with pytest.raises(ValueError, match="a request of the task 'upscale' needs the codes of an image"):
        ProgramBuilder(tiny_model.context).build(request)
