from medusa_exp.config import Config, DecodeConfig
from medusa_exp.stages.session import stop_ids_of


def test_stop_ids(backbone, tokenizer):
    config = Config(decode=DecodeConfig(stop_ids=[5]))
    tokenizer.eos_token = None
    assert stop_ids_of(config, backbone, tokenizer) == {5}
    backbone.model.generation_config.eos_token_id = [2, 3]
    assert stop_ids_of(config, backbone, tokenizer) == {2, 3, 5}
