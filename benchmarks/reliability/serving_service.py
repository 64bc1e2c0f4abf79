"""The process that `serving_load` asks: a server over a small model with random weights, a base and two adapters."""

import socket
import sys

import peft
import torch
import uvicorn
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import mixora
from mixora.answering.roster import Roster
from mixora.endpoint.application import Server
from mixora.endpoint.limits import Limits

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}[assistant]"
LENGTH = 512


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character."""
    letters = ["\n", *map(chr, range(32, 127))]
    inner = Tokenizer(models.WordLevel({token: n for n, token in enumerate([*SPECIAL, *letters])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    inner.decoder = Fuse()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=TEMPLATE, **names)


def make_roster(seed: int = 0) -> Roster:
    """A Llama of 2 layers and width 64, with `red` (mola, 4 experts of which 2 serve a token) and `blue` (lora)."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    marks = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": LENGTH}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes, **marks))
    red = mixora.recipe("mola", num_experts=4, top_k=2, rank=4)
    model = peft.get_peft_model(base, red, adapter_name="red")
    model.add_adapter("blue", mixora.recipe("lora", rank=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mixora_" in name:
                parameter.normal_()
    return Roster(model, tokenizer, "tiny", {name: (name, "auto") for name in ("red", "blue")})


def main(slots: int, queue: int) -> None:
    torch.set_num_threads(1)
    server = Server(make_roster(), Limits(slots=slots, queue=queue))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        uvicorn.Server(uvicorn.Config(server.build(), log_config=None, ws="none")).run(sockets=[listener])


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
