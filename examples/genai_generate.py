"""Run an artifact with ONNX Runtime GenAI: `python genai_generate.py ARTIFACT "Once upon a time" [--dense]`.

Needs onnxruntime-genai 0.18 alone. GenAI reads genai_config.json and knows nothing of masks and prices. Of an artifact
with masks that config is a pipeline, which forwards them from the prefill graph to the decode graph. One with prices is
its decode graph alone, which reads prompts densely and tokens at the price that was built.
"""

import argparse
import json

import onnxruntime_genai as og

# Every weight for every token: the prefill graph alone, as an ordinary decoder.
DENSE = {"model": {"type": "llama", "decoder": {"filename": "prefill.onnx"}}}


def with_library(artifact: str, name: str) -> dict:
    """Let decode use the native kernels of tda-export. GenAI takes a library from the artifact's folder alone."""
    options = {"session_options": {"custom_ops_library": name}}
    with open(f"{artifact}/genai_config.json", encoding="utf-8") as file:
        pipeline = "pipeline" in json.load(file)["model"]["decoder"]
    return {"model": {"decoder": {"pipeline": [{"decode": options}]} if pipeline else options}}


parser = argparse.ArgumentParser()
parser.add_argument("artifact")
parser.add_argument("prompt")
parser.add_argument("--dense", action="store_true", help="Read every weight.")
parser.add_argument("--max-new-tokens", type=int, default=64)
parser.add_argument("--library", metavar="NAME", help="File in the artifact's folder with the native kernels.")
parser.add_argument("--ids", action="store_true", help="Print token ids instead of text.")
args = parser.parse_args()

config = og.Config(args.artifact)
if args.dense:
    config.overlay(json.dumps(DENSE))
if args.library:
    config.overlay(json.dumps(with_library(args.artifact, args.library)))
model = og.Model(config)
tokenizer = og.Tokenizer(model)
stream = tokenizer.create_stream()
tokens = tokenizer.encode(args.prompt)

params = og.GeneratorParams(model)
params.set_search_options(do_sample=False, max_length=len(tokens) + args.max_new_tokens)
generator = og.Generator(model, params)
generator.append_tokens(tokens)
while not generator.is_done():
    generator.generate_next_token()
    token = int(generator.get_next_tokens()[0])
    if generator.is_done() and token in tokenizer.eos_token_ids:
        break
    print(token if args.ids else stream.decode(token), end=" " if args.ids else "", flush=True)
print()
