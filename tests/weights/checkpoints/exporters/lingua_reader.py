"""Logits of a run of facebookresearch/memory, from its files alone and in fp64."""

import json
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu


def logits(folder: Path, ids: Tensor) -> Tensor:
    """Logits ``[T, vocabulary]`` of one sequence, by the repository's names and formulas."""
    p = json.loads((folder / "params.json").read_text())["model"]
    stored = torch.load(folder / "consolidated.pth", weights_only=True)["model"]
    w = {name: tensor.double() for name, tensor in stored.items()}
    x = w["tok_embeddings.weight"][ids]
    for i in range(p["n_layers"]):
        part = {n.removeprefix(f"layers.{i}."): t for n, t in w.items() if f"layers.{i}." in n}
        x = x + attention(norm(x, part["attention_norm.weight"], p), part, p)
        h = norm(x, part["ffn_norm.weight"], p)
        x = x + (memory(h, part, w, p) if "feed_forward.keys" in part else dense(h, part))
    head = "tok_embeddings.weight" if p["weight_tying"] else "output.weight"
    return norm(x, w["norm.weight"], p) @ w[head].T


def norm(x: Tensor, weight: Tensor, p: dict) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + p["norm_eps"]).rsqrt() * weight


def dense(x: Tensor, part: dict) -> Tensor:
    w1, w2, w3 = (part[f"feed_forward.w{n}.weight"] for n in (1, 2, 3))
    return (silu(x @ w1.T) * (x @ w3.T)) @ w2.T


def attention(x: Tensor, part: dict, p: dict) -> Tensor:
    q, k, v = (
        (x @ part[f"attention.w{n}.weight"].T).view(len(x), -1, p["head_dim"]) for n in "qkv"
    )
    lanes = torch.arange(0, p["head_dim"], 2).double() / p["head_dim"]
    angles = torch.arange(len(x)).double().unsqueeze(1) / p["rope_theta"] ** lanes
    turns = torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    q, k = (
        torch.view_as_real(torch.view_as_complex(one.unflatten(-1, (-1, 2)).contiguous()) * turns)
        .flatten(-2)
        .repeat_interleave(p["n_heads"] // one.shape[1], dim=1)
        for one in (q, k)
    )
    v = v.repeat_interleave(p["n_heads"] // v.shape[1], dim=1)
    scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(p["head_dim"])
    scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -math.inf)
    return (
        torch.einsum("hts,shd->thd", scores.softmax(-1), v).flatten(1)
        @ part["attention.wo.weight"].T
    )


def memory(x: Tensor, part: dict, w: dict, p: dict) -> Tensor:
    m = p["productkey_args"]
    owner = m["layers"].split(",")[0] if m["mem_share_values"] else None
    shared = {
        n.removeprefix(f"layers.{owner}."): t for n, t in w.items() if f"layers.{owner}." in n
    }
    t = {n.removeprefix("feed_forward."): one for n, one in (shared | part).items()}

    def linear(name: str, of: Tensor) -> Tensor:
        return of @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    heads, n, k = m["mem_heads"], m["mem_n_keys"], m["mem_knn"]
    q = linear("query_proj.query_mlps.0", x).view(len(x), heads, 2, -1)
    keys = t["keys"].view(heads, 2, n, -1)
    scores, subkeys = torch.einsum("thck,hcnk->thcn", q, keys).topk(k, dim=-1)
    sums = (scores[:, :, 0, :, None] + scores[:, :, 1, None, :]).flatten(2)
    best, places = sums.topk(k, dim=-1)
    first, second = (subkeys[:, :, c].gather(2, i) for c, i in enumerate((places // k, places % k)))
    rows, weights = first * n + second, best.softmax(-1)
    if m["peer_variant"]:
        weights = weights * gelu(torch.einsum("td,thkd->thk", x, t["values_u.weight"][rows]))
        y = torch.einsum("thk,thkd->td", weights, t["values_v.weight"][rows])
    else:
        y = torch.einsum("thk,thkv->tv", weights, t["values.weight"][rows])
        if m["swilu_projection"]:
            y = y * silu(linear("swilu_projection", x))
        if m["swilu_projection"] or m["mem_v_dim"] > 0:
            y = linear("value_proj", y)
    return torch.sigmoid(linear("gating", x)) * y if m["mem_gated"] else y
