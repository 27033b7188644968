"""A target that outgrows one GPU, split over two by transformers' tensor parallelism; the drafter is whole on each.

torchrun --nproc-per-node 2 examples/split.py TARGET DRAFTER      (folders or Hub ids)
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

from ppow import PPOWDrafter

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
target = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype="auto", distributed_config=DistributedConfig(tp_size=2)
)
drafter = PPOWDrafter.from_pretrained(sys.argv[2], dtype=target.dtype).to(target.device)
chat = [{"role": "user", "content": "List three ways to reduce stress."}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = target.generate(**inputs.to(target.device), assistant_model=drafter, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(output[0]))
