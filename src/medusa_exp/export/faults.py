"""What an engine would silently get wrong about a directory of heads, or refuse.

Each function looks for one kind of fault; `structural` are those without which nothing can be made
of the tensors, `all_faults` also those by which engines are misled.
"""

from collections.abc import Iterator

import torch

from medusa_exp.export.declared import Fault
from medusa_exp.export.reading import Block, Head, Reading
from medusa_exp.model.heads import FAMILIES

_WITH_BIAS = ("tgi", "mlc")
"""Formats whose readers ask for a bias of every block."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_PREFIX = {"norm", "q", "k", "v", "out"}
PLUGIN_KEYS = (
    *("num_nextn_predict_layers", "n_predict", "hidden_size", "vocab_size", "num_attention_heads"),
    *("medusa_kind", "medusa_num_layers", "medusa_bias", "medusa_lm_head_bias"),
    "medusa_prefix_attention",
)
"""What the vLLM plugin asks of a config, but for what may be null."""
_PLUGIN_CLASS, _TGI_FILE = "MedusaExpMTP", "medusa_lm_head.safetensors"
_OWN = ("medusa_exp", "vllm")
"""Formats whose configs name family and options as ours do."""


def structural(reading: Reading) -> list[Fault]:
    """Return the faults of the tensors themselves."""
    checks = (_missing, _projections, _shapes, _dtypes, _values, _vocabulary)
    files = [fault for fault in reading.faults if fault.name != "pickle"]
    return [*files, *(fault for check in checks for fault in check(reading))]


def all_faults(reading: Reading) -> list[Fault]:
    """Return all faults that can be seen without the target."""
    pickles = [fault for fault in reading.faults if fault.name == "pickle"]
    checks = (_config, _engine, _family, _counts, _biases, _ties, _truncation, _fingerprints)
    return [
        *pickles,
        *structural(reading),
        *(fault for check in checks for fault in check(reading)),
    ]


def _config(reading: Reading) -> Iterator[Fault]:
    if not reading.config:
        yield Fault("config missing", "there is no config.json: no engine knows what this is")


def _engine(reading: Reading) -> Iterator[Fault]:
    """Find that by which an engine looks for another class or file."""
    names = reading.config.get("architectures", [])
    if reading.format == "vllm":
        if lacking := [key for key in PLUGIN_KEYS if key not in reading.config]:
            yield Fault("wrong config", f"{', '.join(lacking)}: not in config.json")
        elif reading.config["n_predict"] != reading.declared.num_heads:
            text = f"n_predict is {reading.config['n_predict']}, and not num_nextn_predict_layers"
            yield Fault("wrong head count", text)
        if names[:1] != [_PLUGIN_CLASS]:
            text = f"architectures is {names}, and the plugin's class is {_PLUGIN_CLASS}"
            yield Fault("wrong architecture", text)
        elif len(names) == 1 and reading.declared.kind == "hydra":
            text = "behind the plugin's class, vLLM needs DeepSeekMTPModel for heads of hydra"
            yield Fault("wrong architecture", text)
    elif reading.format == "vllm_medusa" and names not in ([], ["MedusaModel"]):
        yield Fault("wrong architecture", f"architectures is {names}: vLLM needs MedusaModel")
    elif reading.format == "tgi" and names:
        text = f"architectures is {names}: TGI then looks for another kind of speculator"
        yield Fault("wrong architecture", text)
    if reading.format == "tgi" and not (reading.place / _TGI_FILE).is_file():
        yield Fault("file misnamed", f"there is no {_TGI_FILE}, which TGI loads", is_error=False)


def _family(reading: Reading) -> Iterator[Fault]:
    """Compare the tensors with the family and the options that a config of ours names."""
    if reading.format not in _OWN:
        return
    kind = reading.declared.kind
    if kind not in FAMILIES:
        yield Fault("wrong family", f"the config says {kind}, which is no family of heads")
        return
    starts = [head.blocks.get(0, Block()) for head in reading.heads]
    if any((start.skip is not None) != FAMILIES[kind].is_sequential for start in starts):
        text = f"the config says {kind}, and heads have, or lack, what sees drafted tokens"
        yield Fault("wrong family", text)
    if any((start.outer is not None) != reading.is_recurrent for start in starts):
        text = f"the config says {kind}, and heads have, or lack, what sharing a block takes"
        yield Fault("wrong family", text)
    if (reading.root_block is not None) != FAMILIES[kind].sees_root:
        text = f"the config says {kind}, and heads have, or lack, what sees the root"
        yield Fault("wrong family", text)
    if reading.prefix and (reading.hidden_size or 0) % (reading.declared.attention_heads or 1):
        number, size = reading.declared.attention_heads, reading.hidden_size
        text = f"num_attention_heads is {number}, which does not divide the hidden size {size}"
        yield Fault("wrong family", text)
    first = reading.heads[0] if reading.heads else Head()
    prefix = "medusa_" if reading.format == "vllm" else ""
    for key, found in (
        ("rank", 0 if first.down is None else len(first.down)),
        ("num_tokens", 0 if reading.token_map is None else len(reading.token_map)),
        ("prefix_attention", bool(reading.prefix)),
        ("own_projections", reading.is_recurrent and not reading.is_one_projection),
        ("lm_head_bias", first.out_bias is not None),
    ):
        said = reading.config.get(prefix + key) or 0
        if said != found and not (key == "lm_head_bias" and kind == "medusa_tied"):
            text = f"the config says {prefix}{key}: {said}, and the tensors {found}"
            yield Fault("wrong family", text)


def _missing(reading: Reading) -> Iterator[Fault]:
    """Find blocks that a head lacks and others have."""
    for k, head in enumerate(reading.heads):
        for number in range(reading.num_layers):
            block = head.blocks.get(number)
            if block is None or block.weight is None:
                text = f"head {k + 1} lacks the weight of block {number + 1}"
                yield Fault("tensors missing", text)
    if len({head.down is None for head in reading.heads}) > 1:
        yield Fault("tensors missing", "some heads have a factor of low rank, and others lack it")
    if (root := reading.root_block) and None in (root.weight, root.skip, root.outer):
        yield Fault("tensors missing", "the block that sees the root lacks a matrix")
    if reading.prefix and (lacking := sorted(_PREFIX - reading.prefix.keys())):
        yield Fault("tensors missing", f"the prefix attention lacks {', '.join(lacking)}")


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
    if declared.hidden_size not in (None, reading.hidden_size):
        text = f"the config says {declared.hidden_size}, and tensors are {reading.hidden_size} wide"
        yield Fault("wrong hidden size", text)
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
    blocks += [] if reading.root_block is None else [reading.root_block]
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
            yield from _shapes_of_block(f"block {number + 1} of head {k + 1}", k, block, size)
        yield from _shape_of_projection(k, head, size)
    if reading.root_block is not None:
        yield from _shapes_of_block("the block that sees the root", 0, reading.root_block, size)
    if reading.shared is not None and size is not None and reading.shared.shape[1] != size:
        yield _wrong_shape("lm_head.weight", reading.shared, (len(reading.shared), size))


def _shapes_of_block(what: str, k: int, block: Block, size: int | None) -> Iterator[Fault]:
    if block.weight is None:
        return
    if block.outer is not None:
        width = size or 0
        rows = inputs = 2 * width
        of_skip = width, width
    else:
        rows = width = len(block.weight)
        inputs = (k + 2) * rows if block.skip is not None else rows
        of_skip = rows, (k + 1) * rows
    for part, tensor, wanted in (
        (what, block.weight, (rows, inputs)),
        (f"the way out of {what}", block.outer, (width, width)),
        (f"the skip of {what}", block.skip, of_skip),
    ):
        if tensor is not None and tuple(tensor.shape) != wanted:
            yield _wrong_shape(part, tensor, wanted)
    if block.outer is None and tuple(block.weight.shape) == (rows, inputs) and rows != size:
        yield Fault("wrong shape", f"{what} has {rows} rows, and the first block {size}")
    if block.bias is not None and len(block.bias) != rows:
        yield Fault("wrong shape", f"the bias of {what} has {len(block.bias)} values for {rows}")


def _shape_of_projection(k: int, head: Head, size: int | None) -> Iterator[Fault]:
    if head.out is None or size is None:
        return
    inputs = size if head.down is None else head.down.shape[0]
    what = f"the projection of head {k + 1}"
    if head.out.shape[1] != inputs:
        yield _wrong_shape(what, head.out, (head.out.shape[0], inputs))
    if head.down is not None and head.down.shape[1] != size:
        yield _wrong_shape(f"the factor before {what}", head.down, (len(head.down), size))
    if head.out_bias is not None and len(head.out_bias) != len(head.out):
        text = f"the bias of {what} has {len(head.out_bias)} values for {len(head.out)}"
        yield Fault("wrong shape", text)


def _wrong_shape(what: str, tensor: torch.Tensor, wanted: tuple[int, int]) -> Fault:
    shape = tuple(tensor.shape)
    if len(shape) == 2 and shape[0] == wanted[1]:
        return Fault("transposed", f"{what} has the shape {shape}: it is transposed")
    return Fault("wrong shape", f"{what} has the shape {shape}, and should have {wanted}")


def _dtypes(reading: Reading) -> Iterator[Fault]:
    of_heads = [(head.out, head.down, *_of_blocks(head)) for head in reading.heads]
    found = {
        tensor.dtype
        for tensors in (*of_heads, _parts(reading.root_block))
        for tensor in tensors
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


def _values(reading: Reading) -> Iterator[Fault]:
    """Find tensors that hold no numbers, or nothing but zeros where they make the logits."""
    for k, head in enumerate(reading.heads):
        tensors = (head.out, head.out_bias, head.down, *_of_blocks(head))
        if any(t is not None and t.dtype in _FLOATS and not t.isfinite().all() for t in tensors):
            yield Fault("not finite", f"head {k + 1} has values that are not finite")
        if head.out is not None and head.out.dtype in _FLOATS and not head.out.any():
            text = f"the vocabulary projection of head {k + 1} is nothing but zeros"
            yield Fault("projections missing", text)
    others = (reading.shared, *reading.prefix.values(), *_parts(reading.root_block))
    if any(t is not None and t.dtype in _FLOATS and not t.isfinite().all() for t in others):
        yield Fault("not finite", "what all heads share has values that are not finite")


def _of_blocks(head: Head) -> list[torch.Tensor | None]:
    return [tensor for block in head.blocks.values() for tensor in _parts(block)]


def _parts(block: Block | None) -> list[torch.Tensor | None]:
    return [] if block is None else [block.weight, block.bias, block.skip, block.outer]


def _vocabulary(reading: Reading) -> Iterator[Fault]:
    """Find projections of another vocabulary than config and token map say."""
    declared, token_map = reading.declared, reading.token_map
    rows = {len(head.out) for head in reading.heads if head.out is not None}
    if len(rows) > 1:
        yield Fault("truncated vocabulary", f"heads know {sorted(rows)} tokens each")
        return
    vocabulary = declared.vocab_size
    if not rows and reading.shared is not None and vocabulary not in (None, len(reading.shared)):
        text = f"lm_head.weight has {len(reading.shared)} rows for {vocabulary} tokens"
        yield Fault("truncated vocabulary", text)
    number = next(iter(rows), None)  # tied heads have no rows of their own
    if token_map is None:
        if None not in (vocabulary, number) and number != vocabulary:
            text = f"heads have {number} rows for {vocabulary} tokens, and no token map says which"
            yield Fault("truncated vocabulary", text)
        return
    ids = token_map.long()
    if number is not None and len(ids) != number:
        text = f"the token map names {len(ids)} tokens, and heads have {number} rows"
        yield Fault("truncated vocabulary", text)
    elif len(ids.unique()) < len(ids) or ids.min() < 0 or ids.max() >= (vocabulary or 2**62):
        text = "the token map names a token twice, or one that the vocabulary lacks"
        yield Fault("truncated vocabulary", text)
    elif reading.format in _OWN and (ids.diff() < 0).any():
        yield Fault("truncated vocabulary", "the token map is not in order, as it was written")


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
    """Compare each head with what it was when it was exported, and with the others."""
    known = reading.declared.heads_sha256
    digests = [reading.head_sha256(k) for k in range(len(reading.heads))]
    for k, digest in enumerate(digests):
        if digests.index(digest) < k and not reading.is_one_projection:
            text = f"head {k + 1} is the same as head {digests.index(digest) + 1}"
            yield Fault("heads alike", f"{text}: a copy, or both are untrained")
    for k, (found, exported) in enumerate(zip(digests, known, strict=False)):
        is_square = _is_square(reading.heads[k])
        if found == exported:
            continue
        if found in known:
            text = f"head {k + 1} is what was exported as head {known.index(found) + 1}"
            yield Fault("heads swapped", text)
        elif is_square and reading.head_sha256(k, is_transposed=True) == exported:
            yield Fault("transposed", f"the blocks of head {k + 1} are transposed")
        else:
            text = f"head {k + 1} is not what was exported under this name"
            yield Fault("heads changed", text)


def _is_square(head: Head) -> bool:
    weights = [block.weight for block in head.blocks.values()]
    return bool(weights) and all(w is not None and w.shape[0] == w.shape[-1] for w in weights)
