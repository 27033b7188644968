"""Ten lines: the bundled pair answers a question, and says how much was accepted. `python examples/quickstart.py`."""

from transformers import AutoModelForCausalLM, AutoTokenizer

from ppow import PPOWDrafter
from ppow.training.smollm2 import demo_pair

name, folder = demo_pair()
tokenizer = AutoTokenizer.from_pretrained(name)
target = AutoModelForCausalLM.from_pretrained(name, dtype="float32")
drafter = PPOWDrafter.from_pretrained(folder, dtype="float32")
chat = [{"role": "user", "content": "List three ways to reduce stress."}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
options = {"max_new_tokens": 64, "do_sample": False, "return_dict_in_generate": True}
output = target.generate(**inputs, assistant_model=drafter, **options)
print(tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(f"{output.acceptance.acceptance_length:.2f} tokens for each pass of the target")
