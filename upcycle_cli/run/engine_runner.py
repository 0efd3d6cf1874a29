"""Run one model in an inference engine, by the engine's own Python: `python engine_runner.py NAME`.

`upcycle verify` and tests/interoperability start this file in environments that have no upcycle, so
it needs the standard library and the engine alone. stdin is the job; stdout is the engine's version
as soon as it is imported, and then the output, both JSON lines:

    {"model": directory, "rows": [[token id]], "tokens": how many to generate after each row,
     "dtype": "float32" or "auto", "trust": whether to run the model's own code,
     "picture": null or {"file", "text", "ids"}, "llama_cpp": null or the directory of llama.cpp}

    {"texts": the greedy tokens after each row, and after the picture,
     "margins": by how many nats the model prefers each of them to the next best,
     "logprobs": the log-probability of each token of a row but the first}

Without texts and margins, the engine does not generate. S positions, T new tokens, V vocabulary.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from heapq import nlargest
from importlib import import_module
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import Any

Job = Mapping[str, Any]
CONVERTER = "convert_hf_to_gguf.py"


def transformers(job: Job) -> dict[str, Any]:
    """Run a model in transformers."""
    import torch
    import transformers as hf

    path, trust = job["model"], {"trust_remote_code": job["trust"]}
    sees = getattr(hf.AutoConfig.from_pretrained(path, **trust), "vision_config", None) is not None
    auto = hf.AutoModelForImageTextToText if sees else hf.AutoModelForCausalLM
    where = {"device_map": "auto"} if torch.cuda.is_available() else {}
    model, loading = auto.from_pretrained(
        path, dtype=job["dtype"], output_loading_info=True, **where, **trust
    )
    # transformers only warns of a weight that it draws at random.
    if wrong := [*sorted(loading["missing_keys"]), *sorted(loading["unexpected_keys"])]:
        count = len(loading["missing_keys"])
        raise ValueError(f"{count} weights missing, {len(wrong) - count} not used: {wrong[0]}")
    # Releases may have other settings, such as a penalty for repeated words.
    model.generation_config = hf.GenerationConfig(pad_token_id=0)

    def greedy(row: list[int] | None) -> Any:  # noqa: ANN401
        inputs = {"input_ids": torch.tensor([row])} if row else seen()
        found = model.generate(
            **{key: value.to(model.device) for key, value in inputs.items()},
            attention_mask=torch.ones_like(inputs["input_ids"], device=model.device),
            max_new_tokens=job["tokens"],
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return torch.cat(found.logits).float().cpu()

    def seen() -> dict[str, Any]:
        processor = hf.AutoProcessor.from_pretrained(path)
        # AutoProcessor chooses the tokenizer by the model type, whatever the files say.
        processor.tokenizer = hf.PreTrainedTokenizerFast.from_pretrained(path)
        picture = {"text": job["picture"]["text"], "images": _opened(job)}
        known = signature(model.forward).parameters.keys() - {"attention_mask"}
        inputs = processor(**picture, return_tensors="pt")
        return {key: value for key, value in inputs.items() if key in known}

    return output_of(job, _forward(model), greedy)


def vllm(job: Job, implementation: str = "auto") -> dict[str, Any]:
    """Run a model in vLLM."""
    from vllm import LLM, SamplingParams

    prompts: list[dict[str, Any]] = [{"prompt_token_ids": row} for row in job["rows"]]
    settings = {"temperature": 0, "max_tokens": job["tokens"], "logprobs": 2}
    settings |= {"ignore_eos": True, "detokenize": False}
    greedy = [SamplingParams(**settings, prompt_logprobs=0) for _ in prompts]
    longest, pictures = _longest(job), {}
    if job["picture"]:
        image = {"multi_modal_data": {"image": _opened(job)}}
        prompts.append({"prompt_token_ids": job["picture"]["ids"], **image})
        greedy.append(SamplingParams(**settings))
        longest, pictures = max(longest, 256), {"limit_mm_per_prompt": {"image": 1, "video": 0}}
    model = LLM(
        job["model"],
        model_impl=implementation,
        dtype=job["dtype"],
        max_model_len=longest,
        enforce_eager=True,
        skip_tokenizer_init=not pictures,
        trust_remote_code=job["trust"],
        **pictures,
    )
    found = model.generate(prompts, greedy, use_tqdm=False)
    new = [request.outputs[0] for request in found]
    return {
        "texts": [[*each.token_ids] for each in new],
        "margins": [
            [_margin(p.logprob for p in b.values()) for b in each.logprobs] for each in new
        ],
        "logprobs": [
            [p[token].logprob for token, p in zip(row[1:], each.prompt_logprobs[1:], strict=True)]
            for row, each in zip(job["rows"], found, strict=False)
        ],
    }


def llama_cpp(job: Job) -> dict[str, Any]:
    """Run a model in llama.cpp, converted by its own script, with the cache in float32."""
    from llama_cpp import GGML_TYPE_F32, Llama

    with tempfile.TemporaryDirectory(prefix="upcycle-gguf-") as name:
        script, path = Path(job["llama_cpp"], CONVERTER), str(Path(name) / "model.gguf")
        dtype = {"float32": "f32"}.get(job["dtype"], "auto")
        sys.argv = [str(script), job["model"], "--outfile", path, "--outtype", dtype]
        sys.path.insert(0, str(script.parent))  # it imports modules beside it
        runpy.run_path(str(script), run_name="__main__")
        cache = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}  # float16 otherwise
        sizes = {"n_ctx": _longest(job), "n_threads": os.cpu_count()}
        model = Llama(path, logits_all=True, verbose=False, **sizes, **cache)

    def forward(row: list[int]) -> Any:  # noqa: ANN401
        model.reset()
        model.eval(row)
        return model.scores[: model.n_tokens]

    def greedy(row: list[int]) -> Any:  # noqa: ANN401
        forward(row)
        for _ in range(job["tokens"] - 1):
            model.eval([int(model.scores[model.n_tokens - 1].argmax())])
        return model.scores[len(row) - 1 : model.n_tokens]

    return output_of(job, forward, greedy)


def mlx(job: Job) -> dict[str, Any]:
    """Run a model in MLX."""
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(job["model"]))
    if job["dtype"] == "float32":
        model.update(tree_map(lambda array: array.astype(mx.float32), model.parameters()))

    def greedy(row: list[int]) -> Any:  # noqa: ANN401
        steps = generate_step(mx.array(row), model, max_tokens=job["tokens"])
        return [logprobs_V.tolist() for _, logprobs_V in islice(steps, job["tokens"])]

    return output_of(job, lambda row: model(mx.array([row]))[0].astype(mx.float32), greedy)


def sglang(job: Job) -> dict[str, Any]:
    """Run a model in SGLang. Written from its documentation: its CPU kernels are not on PyPI."""
    from sglang import Engine

    settings = {"dtype": job["dtype"], "trust_remote_code": job["trust"]}
    settings |= {"skip_tokenizer_init": True, "disable_cuda_graph": True}
    found = Engine(model_path=job["model"], **settings).generate(
        input_ids=job["rows"],
        sampling_params={"temperature": 0, "max_new_tokens": job["tokens"], "ignore_eos": True},
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=2,
    )
    notes = [each["meta_info"] for each in found]
    return {
        "texts": [[*each["output_ids"]] for each in found],
        "margins": [[_margin(p for p, *_ in b) for b in n["output_top_logprobs"]] for n in notes],
        "logprobs": [[p for p, *_ in each["input_token_logprobs"][1:]] for each in notes],
    }


def automodel(job: Job) -> dict[str, Any]:
    """Run a model in NeMo AutoModel, in its own class if it has one. It needs a GPU."""
    import nemo_automodel

    config = json.loads((Path(job["model"]) / "config.json").read_text(encoding="utf-8"))
    kind = "ImageTextToText" if "text_config" in config else "CausalLM"
    auto = getattr(nemo_automodel, f"NeMoAutoModelFor{kind}")
    settings = {"torch_dtype": job["dtype"], "trust_remote_code": job["trust"]}
    model = auto.from_pretrained(job["model"], use_liger_kernel=False, **settings).eval()
    return output_of(job, _forward(model))


def _longest(job: Job) -> int:
    return max(map(len, job["rows"])) + int(job["tokens"])


def _opened(job: Job) -> Any:  # noqa: ANN401
    from PIL import Image

    return Image.open(job["picture"]["file"])


def _forward(model: Any) -> Callable[[list[int]], Any]:  # noqa: ANN401
    """Return what gives logits_SV of a row by a model of torch."""
    import torch

    def forward(row: list[int]) -> Any:  # noqa: ANN401
        with torch.no_grad():
            found = model(torch.tensor([row], device=next(model.parameters()).device))
        return getattr(found, "logits", found)[0].float().cpu()

    return forward


def output_of(
    job: Job, forward: Callable[[Any], Any], greedy: Callable[[Any], Any] | None = None
) -> dict[str, Any]:
    """Return the output, from logits_SV of a row and logits_TV of the tokens after it."""
    import numpy as np

    logprobs, texts, margins = [], [], []
    for row in job["rows"]:
        logits_SV = np.asarray(forward(row), "float64")[: len(row) - 1]
        logits_SV -= np.logaddexp.reduce(logits_SV, axis=-1, keepdims=True)
        logprobs.append(logits_SV[np.arange(len(row) - 1), row[1:]].tolist())
    asked = [*job["rows"], *([None] if job["picture"] else [])]
    for logits_TV in map(np.asarray, map(greedy, asked) if greedy else ()):
        texts.append(logits_TV.argmax(-1).tolist())
        margins.append([_margin(logits_V) for logits_V in logits_TV])
    return {"texts": texts, "margins": margins, "logprobs": logprobs}


def _margin(scores: Iterable[float]) -> float:
    best, second = nlargest(2, scores)
    return float(best - second)


def reason(said: str) -> str:
    """Return the line of what an engine printed that says what went wrong: often not the last."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or line.startswith("Value error,")]
    text = (telling or lines or ["no message"])[-1]
    return text if len(text) <= 200 else f"{text[:200]} …"


ENGINES: Mapping[str, tuple[str, Callable[[Job], dict[str, Any]]]] = {
    "transformers": ("transformers", transformers),
    "vllm": ("vllm", vllm),
    "vllm-transformers": ("vllm", lambda job: vllm(job, "transformers")),
    "llama.cpp": ("llama_cpp", llama_cpp),
    "mlx": ("mlx_lm", mlx),
    "sglang": ("sglang", sglang),
    "automodel": ("nemo_automodel", automodel),
}
"""The module of each engine, and what runs a job in it."""
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its engine in this process
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}

# vLLM and SGLang may start processes that import this file once more.
if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).resolve().parent))  # modules beside this file are not theirs
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an engine prints
    os.environ.update(ENVIRONMENT | os.environ)
    module, run = ENGINES[sys.argv[1]]
    version = getattr(import_module(module), "__version__", "of an unknown version")
    print(json.dumps(version), file=answers, flush=True)
    print(json.dumps(run(json.load(sys.stdin))), file=answers, flush=True)
