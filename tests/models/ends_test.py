"""Adapters of PEFT that train one end of a tied base, or both apart."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.lora import load_adapter
from jaxtrain.models.ends import add_head
from jaxtrain.models.load import load_model, make_decoder
from jaxtrain.tree import overlay

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from runs import tiny_config
from tiny_bases import chat_tokenizer, write_base

from jaxtrain.config import resolve

TOKENS = np.arange(3, 35, dtype=np.int32).reshape(2, 16)


def our_logits(base: pathlib.Path, adapter: pathlib.Path):
    config = tiny_config("lora", str(base))
    config.training.lora.init_from = str(adapter)
    run = resolve(config, device_count=1)
    model = load_model(run)
    params = overlay(model.params, load_adapter(adapter, model.params)[0])
    decoder = make_decoder(run, model.config, model.plan)
    places = jnp.broadcast_to(jnp.arange(16), TOKENS.shape)
    logits = jax.jit(decoder.logits)(params, TOKENS, places, jnp.ones_like(TOKENS))
    return np.asarray(logits), model.config, params


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]]
)
def test_what_modules_to_save_unties_acts_as_in_peft(saved, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = write_base(tmp_path / "base", chat_tokenizer(), tie_word_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    options = peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=saved)
    theirs = peft.get_peft_model(model, options)
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(TOKENS).long()).logits.numpy()
    theirs.save_pretrained(tmp_path / "adapter")

    logits, config, params = our_logits(base, tmp_path / "adapter")
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert not config.tie_word_embeddings
    head, table = params["lm_head"]["kernel"], params["embed_tokens"]["embedding"]
    assert np.abs(head.T - table).max() > 0.1  # two matrices, which differ


def test_a_head_is_added_once_and_only_where_it_is_wanted():
    table = jnp.arange(6.0).reshape(3, 2)
    there = {"embed_tokens": {"embedding": table}}
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        "embed_tokens": {"embedding": jax.ShapeDtypeStruct((3, 2), "f4", sharding=one)},
        "lm_head": {"kernel": jax.ShapeDtypeStruct((2, 3), "f4", sharding=one)},
    }
    added = add_head(there, wanted)
    np.testing.assert_array_equal(added["lm_head"]["kernel"], table.T)
    assert add_head(there, {"embed_tokens": wanted["embed_tokens"]}) is there
    assert add_head(added, wanted) is added
