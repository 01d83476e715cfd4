"""What an engine would silently get wrong about a directory of heads, or refuse.

Each function looks for one kind of fault; `structural` are those without which nothing can be made
of the tensors, `all_faults` also those by which engines are misled.
"""

from collections.abc import Iterator

import torch

from medusa_exp.export.reading import Fault, Head, Reading

_WITH_BIAS = ("tgi", "mlc")
"""Formats whose readers ask for a bias of every block."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def structural(reading: Reading) -> list[Fault]:
    """Return the faults of the tensors themselves."""
    checks = (_missing, _projections, _shapes, _dtypes, _vocabulary)
    files = [fault for fault in reading.faults if fault.name != "pickle"]
    return [*files, *(fault for check in checks for fault in check(reading))]


def all_faults(reading: Reading) -> list[Fault]:
    """Return all faults that can be seen without the target."""
    pickles = [fault for fault in reading.faults if fault.name == "pickle"]
    checks = (_config, _counts, _biases, _ties, _truncation, _fingerprints)
    return [
        *pickles,
        *structural(reading),
        *(fault for check in checks for fault in check(reading)),
    ]


def _config(reading: Reading) -> Iterator[Fault]:
    if not reading.config:
        yield Fault("config missing", "there is no config.json: no engine knows what this is")


def _missing(reading: Reading) -> Iterator[Fault]:
    """Find blocks that a head lacks and others have."""
    for k, head in enumerate(reading.heads):
        for number in range(reading.num_layers):
            block = head.blocks.get(number)
            if block is None or block.weight is None:
                text = f"head {k + 1} lacks the weight of block {number + 1}"
                yield Fault("tensors missing", text)


def _projections(reading: Reading) -> Iterator[Fault]:
    lacking = [k + 1 for k, head in enumerate(reading.heads) if head.out is None]
    if not lacking or (len(lacking) == len(reading.heads) and _may_be_tied(reading)):
        return
    which = "no head" if len(lacking) == len(reading.heads) else f"head {lacking[0]} not"
    text = (
        f"{which} has a vocabulary projection: an engine would start with random ones, and accept "
        "nothing"
    )
    if reading.format == "vllm_medusa" and reading.shared is not None:
        text += "; for the lm_head.weight that is there, set original_lm_head: true"
    yield Fault("projections missing", text)


def _may_be_tied(reading: Reading) -> bool:
    if reading.format == "tgi":
        return reading.num_layers == 1
    return bool(reading.declared.is_tied)


def _counts(reading: Reading) -> Iterator[Fault]:
    declared, found = reading.declared, len(reading.heads)
    if declared.num_heads is not None and declared.num_heads != found:
        text = f"the config says {declared.num_heads} heads, and there are tensors of {found}"
        yield Fault("wrong head count", text)
    if declared.num_layers is not None and declared.num_layers != reading.num_layers:
        text = (
            f"the config says {declared.num_layers} blocks a head, and there are tensors of "
            f"{reading.num_layers}"
        )
        yield Fault("wrong block count", text)


def _biases(reading: Reading) -> Iterator[Fault]:
    blocks = [block for head in reading.heads for block in head.blocks.values()]
    number = sum(block.bias is not None for block in blocks)
    if number not in (0, len(blocks)):
        text = f"{len(blocks) - number} of {len(blocks)} blocks have no bias, and the others have"
        yield Fault("bias dropped", text)
    elif blocks and number == 0 and (reading.declared.has_bias or reading.format in _WITH_BIAS):
        says = "the config" if reading.declared.has_bias else "a reader of this format"
        yield Fault("bias dropped", f"no block has a bias, and {says} asks for them")
    elif number and reading.declared.has_bias is False:
        key = "medusa_fc_bias" if reading.format == "vllm_medusa" else "medusa_bias"
        text = f"blocks have biases that an engine passes over: set {key}: true in config.json"
        yield Fault("bias dropped", text)


def _shapes(reading: Reading) -> Iterator[Fault]:
    """Find matrices of the wrong shape; of a square one transposition cannot be seen."""
    size = reading.hidden_size
    for k, head in enumerate(reading.heads):
        for number, block in sorted(head.blocks.items()):
            if block.weight is None:
                continue
            inputs = (k + 2) if block.skip is not None else 1
            wanted = (block.weight.shape[0], inputs * block.weight.shape[0])
            if tuple(block.weight.shape) != wanted:
                yield _wrong_shape(f"block {number + 1} of head {k + 1}", block.weight, wanted)
        yield from _shape_of_projection(k, head, size)


def _shape_of_projection(k: int, head: Head, size: int | None) -> Iterator[Fault]:
    if head.out is None or size is None:
        return
    inputs = size if head.down is None else head.down.shape[0]
    if head.out.shape[1] != inputs:
        wanted = (head.out.shape[0], inputs)
        yield _wrong_shape(f"the projection of head {k + 1}", head.out, wanted)


def _wrong_shape(what: str, tensor: torch.Tensor, wanted: tuple[int, int]) -> Fault:
    shape = tuple(tensor.shape)
    if len(shape) == 2 and shape[0] == wanted[1]:
        return Fault("transposed", f"{what} has the shape {shape}: it is transposed")
    return Fault("wrong shape", f"{what} has the shape {shape}, and should have {wanted}")


def _dtypes(reading: Reading) -> Iterator[Fault]:
    found = {
        tensor.dtype
        for head in reading.heads
        for tensor in (head.out, head.down, *_of_blocks(head))
        if tensor is not None
    }
    names = sorted(str(dtype).removeprefix("torch.") for dtype in found)
    if strange := [name for name in names if getattr(torch, name) not in _FLOATS]:
        text = f"tensors are of type {', '.join(strange)}: engines would round them as they are"
        yield Fault("wrong dtype", text)
    elif len(names) > 1:
        yield Fault("wrong dtype", f"tensors of the heads are of several types: {', '.join(names)}")
    said = reading.config.get("dtype", reading.config.get("torch_dtype"))
    if said is not None and names and [str(said)] != names and not strange:
        text = f"the config says {said}, and the tensors are {', '.join(names)}"
        yield Fault("wrong dtype", text, is_error=False)
    if reading.token_map is not None and reading.token_map.is_floating_point():
        yield Fault("wrong dtype", "the token map holds no whole numbers")


def _of_blocks(head: Head) -> list[torch.Tensor | None]:
    return [
        tensor
        for block in head.blocks.values()
        for tensor in (block.weight, block.bias, block.skip)
    ]


def _vocabulary(reading: Reading) -> Iterator[Fault]:
    """Find projections of another vocabulary than config and token map say."""
    declared, token_map = reading.declared, reading.token_map
    rows = {len(head.out) for head in reading.heads if head.out is not None}
    if len(rows) > 1:
        yield Fault("truncated vocabulary", f"heads know {sorted(rows)} tokens each")
        return
    if not rows:
        return
    [number] = rows
    vocabulary = declared.vocab_size
    if token_map is None:
        if vocabulary is not None and number != vocabulary:
            text = f"heads have {number} rows for {vocabulary} tokens, and no token map says which"
            yield Fault("truncated vocabulary", text)
        return
    ids = token_map.long()
    if len(ids) != number:
        text = f"the token map names {len(ids)} tokens, and heads have {number} rows"
        yield Fault("truncated vocabulary", text)
    elif len(ids.unique()) < len(ids) or ids.min() < 0 or ids.max() >= (vocabulary or 2**62):
        text = "the token map names a token twice, or one that the vocabulary lacks"
        yield Fault("truncated vocabulary", text)


def _truncation(reading: Reading) -> Iterator[Fault]:
    """Find what vLLM's own format does with a small vocabulary, and rows of zeros."""
    if reading.format == "vllm_medusa":
        small = reading.declared.num_tokens
        has_own = any(head.out is not None for head in reading.heads)
        if small is not None and small != reading.declared.vocab_size and has_own:
            text = "truncated_vocab_size works with a shared lm_head alone: vLLM fails, or is wrong"
            yield Fault("truncated vocabulary", text)
        elif small is None and reading.token_map is not None:
            text = "there is a token_map, which vLLM passes over without truncated_vocab_size"
            yield Fault("truncated vocabulary", text)
    for k, head in enumerate(reading.heads):
        if head.out is not None and (zeros := int((~head.out.any(1)).sum())):
            text = (
                f"{zeros} of {len(head.out)} rows of head {k + 1} are zeros: their logit is 0, and "
                "they are drafted where all others are below it"
            )
            yield Fault("truncated vocabulary", text, is_error=False)
            return


def _ties(reading: Reading) -> Iterator[Fault]:
    has_own = any(head.out is not None for head in reading.heads)
    if reading.format != "vllm_medusa" or not reading.declared.is_tied:
        return
    if reading.shared is None and not has_own:
        text = (
            "original_lm_head is set, and there is no lm_head.weight: vLLM would have a random one"
        )
        yield Fault("tied without matrix", text)
    elif has_own:
        text = "original_lm_head is set: vLLM takes the first head's matrix for all heads"
        yield Fault("stray tensors", text)


def _fingerprints(reading: Reading) -> Iterator[Fault]:
    """Compare each head with what it was when it was exported."""
    known = reading.declared.heads_sha256
    for k in range(min(len(known), len(reading.heads))):
        found = reading.head_sha256(k)
        if found == known[k]:
            continue
        if found in known:
            text = f"head {k + 1} is what was exported as head {known.index(found) + 1}"
            yield Fault("heads swapped", text)
        elif (
            _is_square(reading.heads[k]) and reading.head_sha256(k, is_transposed=True) == known[k]
        ):
            yield Fault("transposed", f"the blocks of head {k + 1} are transposed")
        else:
            text = f"head {k + 1} is not what was exported under this name"
            yield Fault("heads changed", text)


def _is_square(head: Head) -> bool:
    weights = [block.weight for block in head.blocks.values()]
    return bool(weights) and all(w is not None and w.shape[0] == w.shape[-1] for w in weights)
