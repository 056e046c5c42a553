"""deepwright_core as a plugin: what it registers."""

from . import data, finetune, huggingface, tasks, tokenizer
from .hookspecs import hookimpl
from .model import attention, feed_forward
from .registry import Registry
from .stages import prepare, pretrain, sft
from .training import optimizer, schedule


@hookimpl
def deepwright_register(registry: Registry) -> None:
    for part in (
        attention,
        feed_forward,
        finetune,
        optimizer,
        schedule,
        data,
        tokenizer,
        tasks,
        huggingface,
        prepare,
        pretrain,
        sft,
    ):
        part.register(registry)
