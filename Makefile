# The front door. `make` runs every stage at SCALE=tiny; `make help` lists the rest.
SCALE ?= tiny
STAGE ?= pretrain-stage1
NAME ?= nope
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
  $$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)
# Where pip takes torch from, e.g. TORCH_INDEX=<index of the CPU wheels>; empty: the default index.
TORCH_INDEX ?=
VENV ?= .venv
# Threads that wait in a loop lose to any other program on the machine.
OMP_WAIT_POLICY ?= PASSIVE
# On a CPU a step's large tensors come back with the next one: memory that is kept (glibc) needs no
# new pages, which cost up to a fifth of a small model's step.
MALLOC_MMAP_THRESHOLD_ ?= 268435456
MALLOC_TRIM_THRESHOLD_ ?= 536870912
export OMP_WAIT_POLICY MALLOC_MMAP_THRESHOLD_ MALLOC_TRIM_THRESHOLD_
export SCALE TEXT ORIGIN SUBSTITUTES RUNS CACHE FORCE MODEL MODE SUITE CORPUS LIMIT PARTNER SCORES CHAT FROM
export SHARDS NODE_CACHE NODE_CACHE_GB
export BACKEND SAMPLES TRACK REPO PRIVATE PORT CALLS FORMAT REFERENCE YARN A B
export GPU GPUS GPU_GB PRICE DRY SPLIT ENDPOINT STEP ALL JSON EXECUTOR WORKERS

BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)",/\1/p' pyproject.toml)
PIP := $(BIN)/python -m pip --disable-pip-version-check
LAUNCH := $(BIN)/python -m launch

# Asked only by what needs the answer. deepspeed's build imports torch, which isolation would hide.
GPUS_HERE = $(shell nvidia-smi -L 2>/dev/null)
GPU_EXTRA = { $(PIP) install --quiet 'setuptools>=77' wheel packaging ninja && \
  $(PIP) install --quiet --no-build-isolation --editable '.[gpu]'; } || \
  echo "warning: the gpu extra did not install; attention falls back to torch's kernels, several GPUs of post-training wait for deepspeed" >&2

.DEFAULT_GOAL := all

##@ The chain: each stage runs what it takes first; what is finished is left alone

all: report  ## every stage there is, from the tokenizer on

$(VENV)/.installed: pyproject.toml
	@test -n '$(PYTHON)' && $(PYTHON) -c '$(SUPPORTED)' || \
	  { echo "error: PYTHON=$(PYTHON) is not Python 3.11 or 3.12; set PYTHON=<path>" >&2; exit 2; }
	@echo "setting up $(VENV) with pip, once: some minutes"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(PIP) install --quiet --editable '.[dev]'
	$(if $(GPUS_HERE),$(GPU_EXTRA))
	@touch $@

# Stages of recipes/pipeline.yaml; each pulls what it needs.
CHAIN := tokenizer held-out eval-texts data-stage1 data-stage2 data-stage3 \
         pretrain-stage1 pretrain-stage2 pretrain-stage3 \
          data-longctx longctx-32k longctx-64k \
          data-chats midtrain sft apo \
          soup merge release eval report
TOOLS := run submit diff plan data-check mixture replay seen push-shards synthesize train-quality \
         chat serve export conformance compare push publish-checkpoints template-lab merge-sweep ablation \
         eval-reference eval-judge eval-longctx win-rate
.PHONY: all install help test check gpu-check bench bench-data clean $(CHAIN) $(TOOLS)

tokenizer:        ## train the scale's BPE, or fetch the published table (full)
held-out:         ## text that no stage trains on, for every stage that is scored
eval-texts:       ## what evaluation tasks score on, for decontamination
data-stage1:      ## tokenise the 41 sources of stage 1
data-stage2:      ## tokenise the 46 sources of stage 2
data-stage3:      ## tokenise the 56 sources of stage 3
pretrain-stage1:  ## stable phase, 73 % of the steps
pretrain-stage2:  ## stable phase, better mixture, 16 %
pretrain-stage3:  ## decay phase, 11 %
data-longctx:     ## tokenise the sources of both long-context stages
longctx-32k:      ## windows 8 times as long, theta 2M, fresh schedule
longctx-64k:      ## windows 16 times as long, theta 5M
data-chats:       ## the 29 splits of post-training, and held-out prompts
midtrain:         ## reasoning traces in plain ChatML, every token trained
sft:              ## both modes and tools, the assistant's turns alone trained
apo:              ## preferences: the chosen side up, the rejected down
soup:             ## the mean of the last 2 APO checkpoints
merge:            ## 0.9 soup + 0.1 of the long-context model
release:          ## the final transformers folder, with YaRN for twice the window and a model card
eval:             ## score the release and its base on SUITE=<recipes/eval/>, or MODEL=<folder>,<id> alone, LIMIT=<items a task>, BACKEND=
report:           ## runs/<scale>/report.html, .json and .png, and the table of all stages; PRICE=<a GPU-hour> for money
$(CHAIN): $(VENV)/.installed
	@$(LAUNCH) $(if $(and $(filter eval,$@),$(MODEL)),eval,run $@)

##@ Tools

run: $(VENV)/.installed  ## RECIPE=<file>: a recipe of your own that extends a stage's, under its own name
	@test -n '$(RECIPE)' || { echo 'error: RECIPE is missing: make run RECIPE=<file>' >&2; exit 2; }
	@$(LAUNCH) run '$(RECIPE)'

submit: $(VENV)/.installed  ## STAGES="<stages>" on Slurm, with all that they take, at SCALE; DRY=1 only prints the commands
	@$(LAUNCH) submit --stages '$(STAGES)'

diff: $(VENV)/.installed  ## what SCALE changes of the recipe of STAGE=<stage or recipe file>, and why
	@$(LAUNCH) diff '$(STAGE)'

plan: $(VENV)/.installed  ## what SCALE takes on GPU=<card> GPUS=<number> PRICE=<a GPU-hour>; every card without GPU=
	@$(LAUNCH) plan

push-shards: $(VENV)/.installed  ## copy the finished data stages' shards to SHARDS=<url>,<url>: a bucket, any fsspec URL
	@$(LAUNCH) push-shards

push: $(VENV)/.installed  ## the release to the hub's REPO=<owner>/<name>: weights, yarn, GGUF, card, report; DRY=0 sends, PRIVATE=0
	@$(LAUNCH) push

publish-checkpoints: $(VENV)/.installed  ## a revision of REPO=<owner>/<name> for each kept checkpoint; DRY=0 sends, PRIVATE=0
	@$(LAUNCH) publish-checkpoints

data-check: $(VENV)/.installed  ## what the mixtures download and need at SCALE, and whether the hub gives it
	@$(LAUNCH) data-check

mixture: $(VENV)/.installed  ## planned and drawn shares of STAGE=<stage that pretrains>, by source, category and language
	@$(LAUNCH) mixture '$(STAGE)'

replay: $(VENV)/.installed  ## what the model sees at STEP=<n> of STAGE=<stage>: documents, borders, text; ALL=1 uncut, JSON=1
	@$(LAUNCH) replay '$(STAGE)'

seen: $(VENV)/.installed  ## the documents that hold TEXT="...", and the steps that show it; STAGE=<stage> alone; OWN=<what was their TEXT>
	@SOUGHT="$$TEXT" TEXT='$(OWN)' $(LAUNCH) seen $(if $(filter file,$(origin STAGE)),,'$(STAGE)')

chat: $(VENV)/.installed  ## talk to MODEL=<folder> (the release), or to the server ENDPOINT=<url>; MODE=think|no_think CALLS=none|json|code
	@$(LAUNCH) chat

serve: $(VENV)/.installed  ## MODEL=<folder or .gguf> (the release) behind the OpenAI protocol, with tools and both modes; HOST=127.0.0.1 PORT=8000
	@$(LAUNCH) serve $(if $(filter command line,$(origin HOST)),--host '$(HOST)')

export: $(VENV)/.installed  ## FORMAT=f16|f32|bf16|q8_0|q4_k_m (GGUF for llama.cpp), int8|int4, onnx: MODEL=<folder> (the release)
	@$(LAUNCH) export

template-lab: $(VENV)/.installed $(if $(TOKENIZER),,tokenizer)  ## a conversation as the model reads it, its loss mask in colour; ROWS=<jsonl> ROW=<n>
	@$(BIN)/python -m posttrain.template_lab "$(or $(TOKENIZER),$$($(LAUNCH) folder tokenizer)/tokenizer)" \
	  recipes/posttrain/chat_template.jinja $(if $(ROWS),--rows $(ROWS) --row $(or $(ROW),0)) $(if $(EXAMPLE),--example $(EXAMPLE))

synthesize: $(VENV)/.installed  ## SPLIT=<row of posttrain/synthetic.yaml> ENDPOINT=<OpenAI-compatible server> LIMIT=<prompts> MODEL=<its name there>
	@$(LAUNCH) synthesize

eval-longctx: $(VENV)/.installed  ## long-context set on MODEL=<folder> (the release), CORPUS=<texts>, CHAT=1 in its chat template; SUITE=ruler: RULER's own tasks
	@$(LAUNCH) eval-longctx

win-rate: $(VENV)/.installed  ## published models' win rates on SUITE=base|no_think|think, with yours of SCORES=<yaml>
	@$(LAUNCH) win-rate

compare: $(VENV)/.installed  ## runs A=<folder or report.json> and B=<...>: what differs in recipes, curves, scores with intervals
	@$(LAUNCH) compare

merge-sweep: $(VENV)/.installed  ## the soup with PARTNER=<stage or folder> at weights 0 to 1, scored and drawn
	@$(LAUNCH) merge-sweep

ablation: $(VENV)/.installed  ## NAME=nope|gqa|docmask|embed-decay|z-loss|theta|mixture, one change over three seeds
	@$(LAUNCH) ablation $(NAME)

train-quality: $(VENV)/.installed  ## the classifier of the cleaning step `educational`, from ROWS=<texts with score> TEXT_LANGUAGE=eng, good from GOOD=3
	@$(LAUNCH) train-quality

conformance: $(VENV)/.installed  ## is it SmolLM3 there? MODEL=<folder, .gguf or URL> of the kit's model, or of REFERENCE=<its folder>
	@$(BIN)/python -m conformance

install: $(VENV)/.installed  ## set up .venv (every other target does it by itself)

clean:  ## remove runs/ (downloads, corpus and shards in .cache/ stay)
	rm -rf runs

help:  ## this list
	@awk -F ':.*?## ' '/^##@ / {printf "\n%s\n", substr($$0, 5)} \
	  /^[a-z0-9-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '\n%s\n' 'Variables'
	@printf '  %-26s %s\n' 'SCALE=$(SCALE)' 'a file of recipes/scales/, or the path of one of your own' \
	  'TEXT=<file or folder>' 'text of your own in place of every mixture: txt, md, jsonl, parquet, gz too' \
	  'ORIGIN=hub|standin' 'where text and chats come from, in place of what the scale file says' \
	  'SUBSTITUTES=1|0' 'read other sets for those that were never released, or leave them out, in place of the scale file' \
	  'FROM=<folder or id>' 'a SmolLM3 that midtrain, sft, apo or merge starts from, in place of the stage before' \
	  'REFERENCE= YARN=' 'for conformance: the transformers folder of MODEL, and the YaRN variant where not beside it' \
	  'GPUS= GPU_GB=' 'GPUs and their memory, in place of those that are found' \
	  'BACKEND= ENDPOINT= SAMPLES=' 'eval: transformers, vllm or endpoint; servers, commas between; at most so many answers an item' \
	  'EXECUTOR= WORKERS=' 'where data stages tokenise: local, slurm or ray, and in how many processes at once' \
	  'RUNS= CACHE=' 'where runs and downloads go (runs, .cache)' \
	  'SHARDS=<url>,<url>' 'copies of the shards (s3://bucket/shards): data stages take what is there, push-shards fills it' \
	  'NODE_CACHE= NODE_CACHE_GB=' 'a folder of each node for shards that are not on its disk, and its size (100)' \
	  'LID=<file>' 'fastText model that tells languages when text is cleaned, in place of py3langid' \
	  'SOFTWARE_HERITAGE=<url>' 'where texts of sets that list file ids are, in place of its public bucket' \
	  'PORT= HOST=' 'where make serve listens (8000, 127.0.0.1)' \
	  'TRACK=<tracker>' 'trackio, wandb or tensorboard: every trained stage is logged there too, in runs/<scale>/tracking' \
	  'FORCE=1' 'set a finished stage aside and do it again' \
	  'TORCH_INDEX=<url> PYTHON=' 'for the set-up: where pip takes torch from, and Python 3.11 or 3.12'

##@ Checks

test: $(VENV)/.installed  ## the quick tests, some minutes
	@$(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile

check: $(VENV)/.installed  ## lint, types, the arrows between folders and all tests, as CI does
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports
	@$(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile
	@$(BIN)/python -m pytest -m slow -n 2 --dist loadfile --no-loadscope-reorder

gpu-check: $(VENV)/.installed  ## the tests that need a GPU: its kernels, bf16, the fast step, a resume
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
	  { echo 'error: no GPU here: nothing was run' >&2; exit 2; }
	@$(BIN)/python -m pytest -m gpu

eval-reference: $(VENV)/.installed  ## SmolLM2-135M on the local suite, against stored figures
	@$(LAUNCH) eval-reference

eval-judge: $(VENV)/.installed  ## SmolLM2-135M, or MODEL=, on the local suite by lm-evaluation-harness too, and by ENDPOINT=
	@$(BIN)/python benchmarks/judge.py $(if $(MODEL),--model '$(MODEL)')

bench: $(VENV)/.installed  ## measure `make` stage by stage into benchmarks/
	@$(BIN)/python benchmarks/stages.py

bench-data: $(VENV)/.installed  ## measure tokenising beside datatrove's own step, into benchmarks/data.json
	@$(BIN)/python benchmarks/data.py
