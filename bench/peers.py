"""What bench/engine.py runs in the peers' own environment: python bench/peers.py hflm|llama|llama-one FOLDER < job.json"""

import json
import resource
import sys
import time


def hflm(folder, job):
    "lm-evaluation-harness: log-likelihoods of continuations that are tokens already."
    import torch
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(job["threads"])
    lm = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=8, max_length=2048)
    rows = [(("", ""), context, rest) for context, rest in job["examples"]]
    return clocked(lambda: lm._loglikelihood_tokens(rows, disable_tqdm=True), sum(len(r) for _, r in job["examples"]))


def llama(folder, job, at_once=20):
    "llama.cpp: each prompt is read once and shared by its n samples; so many prompts at a time."
    import llama_cpp as L

    L.llama_backend_init()
    silent = L.llama_log_callback(lambda *_: None)  # kept: the library holds no reference
    L.llama_log_set(silent, None)
    model = L.llama_model_load_from_file(job["gguf"].encode(), L.llama_model_default_params())
    n, end, most = job["n"], job["end"], job["max_new_tokens"]
    longest = max(map(len, job["prompts"]))
    p = L.llama_context_default_params()
    p.n_ctx, p.n_batch, p.n_ubatch, p.n_seq_max = at_once * (longest + n * most), 2048, 512, at_once * n
    p.n_threads = p.n_threads_batch = job["threads"]
    p.kv_unified, p.type_k, p.type_v = True, 0, 0  # float32 keys and values
    context = L.llama_init_from_model(model, p)
    memory, batch = L.llama_get_memory(context), L.llama_batch_init(2048, 0, 1)
    chain = L.llama_sampler_chain_init(L.llama_sampler_chain_default_params())
    for s in (L.llama_sampler_init_top_k(40), L.llama_sampler_init_top_p(0.95, 1), L.llama_sampler_init_temp(0.9), L.llama_sampler_init_dist(1)): L.llama_sampler_chain_add(chain, s)

    def decode(rows):  # (token, position, sequence, whether logits are wanted)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, position, 1, sequence, wanted
        assert L.llama_decode(context, batch) == 0

    def run():
        said = 0
        for start in range(0, len(job["prompts"]), at_once):
            L.llama_memory_clear(memory, True)
            live = []
            for k, prompt in enumerate(job["prompts"][start : start + at_once]):
                decode([(t, i, k * n, i == len(prompt) - 1) for i, t in enumerate(prompt)])
                for j in range(n):
                    if j: L.llama_memory_seq_cp(memory, k * n, k * n + j, 0, -1)
                    live.append([k * n + j, len(prompt), L.llama_sampler_sample(chain, context, len(prompt) - 1), 1])
            while live := [r for r in live if r[2] != end and r[3] < most]:
                decode([(token, position, sequence, True) for sequence, position, token, _ in live])
                for i, r in enumerate(live): r[1], r[2], r[3], said = r[1] + 1, L.llama_sampler_sample(chain, context, i), r[3] + 1, said + 1
            said += min(at_once, len(job["prompts"]) - start) * n
        return said

    return clocked(run)


def clocked(f, tokens=None):
    "Processor and wall time, tokens, and the peak memory of the process."
    wall, cpu = time.perf_counter(), time.process_time()
    out = f()
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "tokens": out if tokens is None else tokens,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


if __name__ == "__main__":
    how = {"hflm": hflm, "llama": llama, "llama-one": lambda folder, job: llama(folder, job, 1)}[sys.argv[1]]
    print(json.dumps(how(sys.argv[2], json.load(sys.stdin))))
