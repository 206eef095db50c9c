"""Decode steps of a Llama shape in PyTorch with NCCL: the point to compare Caravan's figures on GPUs with.

One process a GPU, float16, weights made on the device. Tensor parallel as Megatron-LM does it: heads and feed-forward
columns are cut, two all-reduces a layer. A step is measured eagerly, and replayed as a CUDA graph.

    python3 test/bench/torch_peer.py --shape 7b --tp 1 --batches 1,16,64
    python3 test/bench/torch_peer.py --shape 70b --tp 2 --batches 1,16,64 --json peer.json
"""

import argparse
import json
import os
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

# hidden, feed-forward, query heads, KV heads, layers, vocabulary
SHAPES = {
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "13b": (5120, 13824, 40, 40, 40, 32000),
    "70b": (8192, 28672, 64, 8, 80, 32000),
}
HEAD = 128


def rotate(x, cos, sin):
    """Half-split rotary embedding of x (batch, heads, 1, HEAD)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Rank:
    """One rank's share of the weights and of the KV cache, and a decode step over them."""

    def __init__(self, shape, tp, batch, context, capacity, device):
        hidden, ffn, heads, kv_heads, layers, vocab = SHAPES[shape]
        self.tp, self.heads, self.kv_heads = tp, heads // tp, kv_heads // tp
        self.context = context

        def weight(outputs, inputs):
            return torch.empty(outputs, inputs, dtype=torch.float16, device=device).normal_(0, 0.01)

        rows = (self.heads + 2 * self.kv_heads) * HEAD
        self.layers = [
            {
                "qkv": weight(rows, hidden),
                "o": weight(hidden, self.heads * HEAD),
                "gate_up": weight(2 * ffn // tp, hidden),
                "down": weight(hidden, ffn // tp),
                "norm": torch.ones(2, hidden, dtype=torch.float16, device=device),
                "keys": torch.zeros(batch, self.kv_heads, capacity, HEAD, dtype=torch.float16, device=device),
                "values": torch.zeros(batch, self.kv_heads, capacity, HEAD, dtype=torch.float16, device=device),
            }
            for _ in range(layers)
        ]
        self.head = weight(vocab // tp, hidden)
        self.x = torch.randn(batch, 1, hidden, dtype=torch.float16, device=device)
        angle = torch.arange(HEAD // 2, device=device) * context / 100.0
        self.cos, self.sin = angle.cos().half(), angle.sin().half()

    def weight_bytes(self):
        per_layer = ("qkv", "o", "gate_up", "down", "norm")
        tensors = [layer[name] for layer in self.layers for name in per_layer] + [self.head]
        return sum(t.numel() * t.element_size() for t in tensors)

    def all_reduce(self, x):
        if self.tp > 1:
            dist.all_reduce(x)
        return x

    def step(self):
        h = self.x
        batch = h.shape[0]
        for layer in self.layers:
            x = F.rms_norm(h, (h.shape[-1],), layer["norm"][0], 1e-5)
            qkv = F.linear(x, layer["qkv"]).view(batch, 1, -1, HEAD).transpose(1, 2)
            q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
            layer["keys"][:, :, self.context : self.context + 1] = rotate(k, self.cos, self.sin)
            layer["values"][:, :, self.context : self.context + 1] = v
            attended = F.scaled_dot_product_attention(
                rotate(q, self.cos, self.sin),
                layer["keys"][:, :, : self.context + 1],
                layer["values"][:, :, : self.context + 1],
                enable_gqa=self.heads != self.kv_heads,
            )
            h = h + self.all_reduce(F.linear(attended.transpose(1, 2).reshape(batch, 1, -1), layer["o"]))
            x = F.rms_norm(h, (h.shape[-1],), layer["norm"][1], 1e-5)
            gate, up = F.linear(x, layer["gate_up"]).chunk(2, dim=-1)
            h = h + self.all_reduce(F.linear(F.silu(gate) * up, layer["down"]))
        return F.linear(h, self.head)


def milliseconds(run, count=20):
    for _ in range(5):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        run()
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start) / count


@torch.inference_mode()
def work(rank, options, results):
    torch.cuda.set_device(rank)
    if options.tp > 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29561")
        dist.init_process_group("nccl", rank=rank, world_size=options.tp)
    for batch in map(int, options.batches.split(",")):
        model = Rank(options.shape, options.tp, batch, options.context, 1024, f"cuda:{rank}")
        row = {
            "shape": options.shape,
            "tp": options.tp,
            "batch": batch,
            "context": options.context,
            "weightBytesPerRank": model.weight_bytes(),
            "eagerMs": milliseconds(model.step),
        }
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            model.step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model.step()
        row["graphMs"] = milliseconds(graph.replay)
        row["tokensPerSecond"] = 1000 * batch / min(row["eagerMs"], row["graphMs"])
        if rank == 0:
            results.append(row)
            print(json.dumps(row), flush=True)
        del graph, model
        torch.cuda.empty_cache()
    if options.tp > 1:
        dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--json", help="where the rows are written")
    options = parser.parse_args()
    with mp.Manager() as manager:
        results = manager.list()
        mp.spawn(work, (options, results), nprocs=options.tp)
        if options.json:
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump({"torch": torch.__version__, "rows": list(results)}, file, indent=1)


if __name__ == "__main__":
    main()
