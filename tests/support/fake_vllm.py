"""A double of the little of vLLM that our model touches, and of the order in which it is called.

`install` puts the modules into place. `Engine` schedules requests as vLLM's two runners do, chunked
prompts and rejected draft tokens included, verifies greedily, and lets the model draft: `v1` by
hand, as measured in a running vLLM 0.32; `v2` as read in its MultiModuleMTPSpeculator.

N scheduled tokens, R requests, D hidden.
"""

import importlib
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AutoConfig

RETURN_TUPLES = {"DeepSeekMTPModel", "DeepseekV32MTPModel", "Glm5NextMTPModel", "KimiK3MTPModel"}
SLOTS: list[tuple[int, int] | None] = []
"""Of each scheduled token its request and position; None where nothing is to be kept."""


class LogitsProcessor(nn.Module):
    """Cuts off the rows that a padded vocabulary has too many."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, lm_head, hidden, bias=None):
        return linear(hidden, lm_head.weight, bias)[:, : self.vocab_size]


class ParallelLMHead(nn.Module):
    """Has rows for a multiple of 64 tokens, and its own way to load them."""

    def __init__(self, num, size, bias=False, prefix=""):
        super().__init__()
        rows = -(-num // 64) * 64
        self.weight = nn.Parameter(torch.full((rows, size), torch.nan), requires_grad=False)
        self.weight.weight_loader = self.load
        if bias:
            self.bias = nn.Parameter(torch.full((rows,), torch.nan), requires_grad=False)
            self.bias.weight_loader = self.load
        self.num = num

    def load(self, parameter, tensor):
        assert len(tensor) == self.num
        parameter.data.zero_()[: self.num] = tensor


class Attention(nn.Module):
    """Keeps keys and values by request and position, as pages would."""

    def __init__(self, heads, width, scale, num_kv_heads, cache_config, prefix):
        super().__init__()
        assert sum(part.isdigit() for part in prefix.split(".")) == 1, prefix
        assert num_kv_heads == heads and scale == width**-0.5
        self.heads, self.kept = heads, {}

    def forward(self, q, k, v):
        q, k, v = (x.unflatten(1, (self.heads, -1)) for x in (q, k, v))
        self.kept |= {slot: (k[n], v[n]) for n, slot in enumerate(SLOTS) if slot}
        out = torch.zeros_like(q)
        for n, slot in enumerate(SLOTS):
            if slot:
                seen = [self.kept[slot[0], position] for position in range(slot[1] + 1)]
                keys, values = (torch.stack(x, 1) for x in zip(*seen, strict=True))
                out[n] = scaled_dot_product_attention(q[n, :, None], keys, values)[:, 0]
        return out.flatten(1)


class Registry:
    def __init__(self):
        self.known = {}

    def get_supported_archs(self):
        return self.known.keys()

    def register_model(self, name, where):
        assert name not in self.known
        self.known[name] = where

    def load(self, architectures):
        module, name = self.known[next(a for a in architectures if a in self.known)].split(":")
        return getattr(importlib.import_module(module), name)


class Step3p5MTPProposer:
    """V1's proposer: it shares no lm_head."""

    def __init__(self, model):
        self.model = model

    def _maybe_share_lm_head(self, target):
        return


def default_weight_loader(parameter, tensor):
    assert parameter.shape == tensor.shape
    parameter.data.copy_(tensor)


def install(monkeypatch):
    """Put the double into `sys.modules`; return its registry."""
    registry = Registry()
    layers, models = "vllm.model_executor.layers.", "vllm.model_executor.models."
    modules = {
        "vllm": {"ModelRegistry": registry},
        f"{layers}attention": {"Attention": Attention},
        f"{layers}logits_processor": {"LogitsProcessor": LogitsProcessor},
        f"{layers}vocab_parallel_embedding": {"ParallelLMHead": ParallelLMHead},
        "vllm.model_executor.model_loader.weight_utils": {
            "default_weight_loader": default_weight_loader
        },
        f"{models}utils": {
            "maybe_prefix": lambda prefix, name: f"{prefix}.{name}" if prefix else name
        },
        "vllm.v1.spec_decode.step3p5": {
            "Step3p5MTPProposer": type("Step3p5MTPProposer", (Step3p5MTPProposer,), {})
        },
    }
    for name, contents in modules.items():
        for end in range(1, name.count(".") + 2):
            parent = ".".join(name.split(".")[:end])
            if parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        for key, value in contents.items():
            setattr(sys.modules[name], key, value)
    monkeypatch.delitem(sys.modules, "medusa_exp.serving.vllm_model", raising=False)
    return registry


@dataclass
class Request:
    number: int
    tokens: list[int]
    prompt_length: int
    computed: int = 0
    drafts: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    """Draft tokens of each step that were."""
    cached: list[tuple[int, int, torch.Tensor]] = field(default_factory=list)
    """V2's window: token, position and state of the last inputs of the drafter."""


class Engine:
    """Serves a model of transformers with exported heads."""

    def __init__(self, registry, backbone, directory, num_tokens, runner="v1"):
        from medusa_exp.serving.vllm_plugin import register

        register()
        register()  # vLLM does so in each process, perhaps more than once
        self.backbone, self.num_tokens, self.runner = backbone, num_tokens, runner
        config = AutoConfig.from_pretrained(directory)
        model_config = SimpleNamespace(
            hf_text_config=backbone.model.config,
            model=backbone.model.config.name_or_path,
            revision=None,
            trust_remote_code=False,
        )
        speculative = SimpleNamespace(
            draft_model_config=SimpleNamespace(hf_config=config),
            num_speculative_tokens=num_tokens,
            target_model_config=model_config,
        )
        vllm_config = SimpleNamespace(speculative_config=speculative, cache_config=None)
        self.model = registry.load(config.architectures)(vllm_config=vllm_config)
        self.model.load_weights(load_file(directory / "model.safetensors").items())
        self.returns_tuple = bool(RETURN_TUPLES & set(config.architectures))
        target = SimpleNamespace(lm_head=backbone.lm_head)
        assert not hasattr(self.model, "has_own_embed_tokens")
        self.model.model.embed_tokens = backbone.model.get_input_embeddings()
        if runner == "v1":
            module = sys.modules["vllm.v1.spec_decode.step3p5"]
            module.Step3p5MTPProposer(self.model)._maybe_share_lm_head(target)
        elif not getattr(self.model, "has_own_lm_head", False):
            self.model.lm_head = target.lm_head

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, chunk=6):
        """Return the finished requests, and each draft with the tokens that it continues."""
        requests = [Request(i, list(p), len(p)) for i, p in enumerate(prompts)]
        drafted = []
        while active := [r for r in requests if len(r.tokens) - r.prompt_length < max_new_tokens]:
            scheduled = [self._run_target(request, chunk) for request in active]
            propose = self._propose_v1 if self.runner == "v1" else self._propose_v2
            for request, guesses in zip(active, propose(active, scheduled), strict=True):
                if request.computed >= request.prompt_length:
                    request.drafts = guesses
                    drafted.append((list(request.tokens), guesses))
        return requests, drafted

    def _run_target(self, request, chunk):
        """Run the next tokens of a request; return (ids, positions, states, rejected, next)."""
        start, is_prompt = request.computed, request.computed < request.prompt_length
        if is_prompt:
            ids = request.tokens[start : min(start + chunk, request.prompt_length)]
        else:
            ids = request.tokens[start:] + request.drafts
        whole = torch.tensor([request.tokens[:start] + ids])
        states = self.backbone.hidden_states(whole)[0, start:]
        choices = self.backbone.next_logits(states).argmax(-1).tolist()
        rejected = 0
        if is_prompt and start + len(ids) < request.prompt_length:
            following = request.tokens[start + len(ids)]
        elif is_prompt:
            following = choices[-1]
            request.tokens.append(following)
        else:
            right = 0
            while right < len(request.drafts) and request.drafts[right] == choices[right]:
                right += 1
            request.accepted.append(right)
            request.tokens += choices[: right + 1]
            rejected, following = len(request.drafts) - right, choices[right]
        request.computed += len(ids) - rejected
        return ids, list(range(start, start + len(ids))), states, rejected, following

    def _propose_v1(self, requests, scheduled):
        """Run all scheduled tokens, rejected ones too, then one row a request."""
        ids, positions, states, last = [], [], [], []
        SLOTS[:] = []
        for request, (own, places, hidden, rejected, following) in zip(
            requests, scheduled, strict=True
        ):
            at = len(ids) + len(own) - rejected - 1
            ids += [*own[1:], 0]
            ids[at] = following
            positions += places
            states.append(hidden)
            last.append(at)
            SLOTS.extend((request.number, place) for place in places)
        positions = torch.tensor(positions)
        sample, feedback = self._call(torch.tensor(ids), positions, torch.cat(states), 0)
        rows, feedback, positions = sample[last], feedback[last], positions[last]
        found = [self.model.compute_logits(rows, spec_step_idx=0).argmax(-1)]
        for step in range(1, self.num_tokens):
            positions = positions + 1
            rows, feedback = self._call(found[-1], positions, feedback, step)
            found.append(self.model.compute_logits(rows, spec_step_idx=step).argmax(-1))
        return torch.stack(found, 1).tolist()

    def _propose_v2(self, requests, scheduled):
        """Run all tokens at every step, shifted by one, with some of the last step in front."""
        ids, positions, states, spans = [], [], [], []
        SLOTS[:] = []
        for request, (own, places, hidden, rejected, following) in zip(
            requests, scheduled, strict=True
        ):
            again = request.cached[len(request.cached) - max(0, rejected - 1) :]
            kept = len(own) - rejected
            rows = [
                *again,
                *zip([*own[1:kept], following], places[:kept], hidden[:kept], strict=True),
            ]
            spans.append((len(ids), len(ids) + len(rows)))
            request.cached = rows[-(self.num_tokens - 1) :] if self.num_tokens > 1 else []
            unused = [(0, 0, torch.zeros_like(hidden[0]))] * (len(own) - len(rows))
            SLOTS.extend((request.number, place) for _, place, _ in rows)
            SLOTS.extend([None] * len(unused))
            for token, place, state in [*rows, *unused]:
                ids.append(token)
                positions.append(place)
                states.append(state)
        ids_N, positions_N = torch.tensor(ids), torch.tensor(positions)
        last = [stop - 1 for _, stop in spans]
        feedback, found = torch.stack(states), []
        for step in range(self.num_tokens):
            sample, feedback = self._call(ids_N, positions_N, feedback, step)
            found.append(self.model.compute_logits(sample[last], spec_step_idx=step).argmax(-1))
            for (start, stop), token in zip(spans, found[-1], strict=True):
                ids_N[start : stop - 1] = ids_N[start + 1 : stop].clone()
                ids_N[stop - 1] = token
        return torch.stack(found, 1).tolist()

    def _call(self, ids_N, positions_N, states_ND, step):
        out = self.model(
            input_ids=ids_N,
            positions=positions_N,
            hidden_states=states_ND,
            inputs_embeds=None,
            spec_step_idx=step,
        )
        is_tuple = isinstance(out, tuple)
        assert self.runner == "v2" or is_tuple == self.returns_tuple
        return out if is_tuple else (out, out)
