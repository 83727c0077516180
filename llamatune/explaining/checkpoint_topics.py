"""Topics of exit code 4: models, adapters, tokenizers and checkpoints."""

from __future__ import annotations

from llamatune.explaining.topics import topic

CHECKPOINT_TOPICS = (
    topic(
        "no model or adapter at that path",
        4,
        r"no such (model|adapter|file|directory)|safetensors files but|files in \.bin|not a GGUF file|"
        r"neither config\.json|a file where|an adapter, not|a GGUF file, not|only a GGUF|no weights|no … in it|"
        r"is missing$|\.pth is missing|no trained weights|not a run directory|no variant|variant … of the weights|"
        r"… of the weights|begins? with|without its manifest|neither weights nor",
        "A directory is not there, or holds something else: a model has config.json (Hugging Face) or params.json "
        "(Meta), an adapter has adapter_config.json. Nothing is downloaded.",
        "error: no such model directory: models/llama-2-7b",
        "Give the directory itself; fetch a model of the Hub with `hf download NAME --local-dir DIR`.",
    ),
    topic(
        "an adapter that does not fit its base",
        4,
        r"trained on another base|of another shape|GGUF adapter|is not adapted|trained with another template|"
        r"scaling … of|no matrix|the adapter|update of|adds a bias|two tensors are called|vocabulary of|"
        r"with this adapter|which does not fit its module|neither summed nor|trains token|already merged|"
        r"has no …$|adapter_config|summed|of r …|peft|two shapes of model|they differ in|same linear layers|"
        r"merged model keeps|target_modules|base …|another base",
        "An adapter belongs to the base that it was trained on: its matrices have that model's sizes, and its update "
        "means something on those weights alone.",
        "error: the adapter was trained on another base: runs/alpaca/adapter",
        "Give the base of its run (its adapter_config.json and card name it); --force-base takes another of the same "
        "shape, for those who know why.",
    ),
    topic(
        "a damaged or altered file",
        4,
        r"malformed|became shorter|broken|differs from what|own SHA-256|is not what it was|shorter than|"
        r"bytes where|steps where|should be|not in the manifest|overlap or leave a gap|no run of a tensor|"
        r"not valid JSON|strict JSON|holds no report|incomplete|not the tensors|began with this file|"
        r"index disagrees|has no weight_map|… is …|has no …|checkpoint of step|numbers for|tensors do not fit|"
        r"do not fit the configuration|not sound|no sound|not a sound|recorded|not a spec that this|"
        r"its shards are not|a stored chat template|of a stored|fit each other|\(and … more|more: …|"
        r"is missing and|altered|length|not as it|bytes, not|unexpected",
        "A file is shorter than it says, not what its manifest or digest recorded, or its parts contradict each "
        "other: a copy that was cut, a disk that was full, or an edit.",
        "error: differs from what its manifest recorded: runs/alpaca/adapter/adapter_model.safetensors",
        "Fetch or copy the file again, or take an earlier checkpoint; `llamatune verify DIR` checks every file.",
    ),
    topic(
        "a file that is refused as unsafe",
        4,
        r"refused|unsafe|share bytes|pickle|recipe|too many|too deep|would take|decimal digits",
        "Files come from elsewhere. What could run code when it is read, reaches outside its directory, or would take "
        "memory without bound is refused; weights are read without pickle.",
        "error: refused: it would call os.system: consolidated.00.pth: only plain tensors saved by torch.save are read",
        "Do not use the file. Get the weights from their publisher, as safetensors where there are any.",
    ),
    topic(
        "a model that is not supported",
        4,
        r"not supported|which … cannot hold|which \S+ cannot hold|a bias in|sliding_window|no LLaMA model|"
        r"no model has|multiple of|impossible|rope|rotary|head_dim|which LLaMA|is too small|eos_token_id|quantis|"
        r"another way to compute|would change its|cannot hold it|is not read|two quantis|model_type|not of Llama|"
        r"hidden_act|low_freq|attention|biases|no LLaMA|no place for|format",
        "The configuration describes another architecture, or one that the wanted format cannot hold. A model that is "
        "computed almost as it was trained would give wrong answers without a word.",
        "error: num_attention_heads 14 is no multiple of num_key_value_heads 4: config.json",
        "Use a model of the families that the README lists; `llamatune convert` changes formats.",
    ),
    topic(
        "a tokenizer that cannot be used",
        4,
        r"token|tokenizer|chat_template is|its model is of kind|its … … has|SentencePiece|merges|decoder|"
        r"pre_tokenizer|vocabulary|normalizer|makes a text|pattern|EOS|BOS|llama\.cpp|dropout",
        "The tokenizer is missing, damaged, of a kind that cannot be read as its library does, or contradicts "
        "the files beside it.",
        "error: no tokenizer.model or tokenizer.json in this directory: models/llama-2-7b",
        "Copy tokenizer.model or tokenizer.json of the same model beside its weights.",
    ),
    topic(
        "a checkpoint of another run or spec",
        4,
        r"optimizer|an earlier version|closed_epochs|scaler is|started on something else|reads another content|"
        r"not as this run trains|this run trains|another shape or dtype|written by|another version|newer|schema|"
        r"data changed|was prepared|has changed|changed since|what the run|resum",
        "A run continues bit for bit, so its checkpoint must be of the same spec, base, rows and version of the "
        "format.",
        "error: its state of q_proj is another optimizer's: checkpoints/step-000100",
        "Use the spec and the data that the run began with, or begin another run.",
    ),
    topic(
        "a benchmark that cannot be shown",
        4,
        r"benchmark\.json|a cell |its cells",
        "`report --benchmark` reads benchmark.json, which `llamatune benchmark` writes when all cells are measured. "
        "Here it is missing, or was changed since.",
        "error: no benchmark.json in it: benchmarks/precision",
        "Give the --output directory of a finished benchmark; the same benchmark command completes one that is not.",
    ),
    topic(
        "weights that are NaN, infinite or of an odd kind",
        4,
        r"holds NaN or infinity|would hold NaN|not a float|rounded to|vanish",
        "A tensor holds NaN or infinity, or would in the dtype that was asked for; nothing sound can be computed or "
        "saved from it.",
        "error: q_proj.lora_A holds NaN or infinity: adapter_model.safetensors",
        "Take an earlier checkpoint, or another dtype.",
    ),
)
