"""vLLM, asked through its standard input: runs in the environment of benchmarks/requirements-vllm.txt.

    python vllm_side.py MODEL IN_FLIGHT

Each line in, in JSON, is {"prompts": ids, "new": tokens} to keep, or {} to answer what is kept; each line out how many
tokens there were.
"""

import json
import os
import sys
from typing import IO, Any

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else its threads keep others from the cores
os.environ["VLLM_NO_USAGE_STATS"] = "1"


def serve(model: str, in_flight: int, answers: IO[str]) -> None:
    """Answer until the input ends."""
    import vllm

    engine = vllm.LLM(
        model,
        dtype="float32",
        max_model_len=4096,
        max_num_seqs=in_flight,
        max_num_batched_tokens=8192,  # as ours prefills
        enable_prefix_caching=True,
        skip_tokenizer_init=True,
    )

    def say(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    say(version=vllm.__version__)
    prompts, sampling = [], None
    for line in sys.stdin:
        asked = json.loads(line)
        if asked:
            prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
            sampling = vllm.SamplingParams(temperature=1.0, max_tokens=asked["new"], ignore_eos=True, detokenize=False)
            say(tokens=0)
            continue
        engine.reset_prefix_cache()
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        say(tokens=sum(len(output.outputs[0].token_ids) for output in outputs))


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no answer
    serve(sys.argv[1], int(sys.argv[2]), answers)
