"""Topics of exit code 2: the command line and the run spec."""

from __future__ import annotations

from llamatune.explaining.topics import topic

SPEC_TOPICS = (
    topic(
        "a key of the spec",
        2,
        r"unknown key|^… errors|\d+ errors: |a spec may have|nothing is known of|no verb ends|: missing|"
        r"is no override|is not a section|not a mapping of sections|lora: empty|no key of the spec|"
        r"are the same$|should be |the spec was changed so often|changes a run spec",
        "The spec has a key that is not known, lacks one, or has a value of another kind; or an override on the "
        "command line does not name a key. Unknown keys are refused because a misspelt one would silently change "
        "nothing.",
        "error: lora.rank: unknown key, did you mean 'r'?: run.yaml",
        "`llamatune explain SECTION` lists the keys of a section, `llamatune explain KEY` their values; an override is "
        "section.key=value, as training.seed=1.",
    ),
    topic(
        "not valid YAML or text",
        2,
        r"not valid YAML|nested too deeply|not UTF-8 at byte|a template file (is|has)|has control characters",
        "A spec, template file or argument could not be read as text: a quote or bracket that is not closed, a tab, a "
        "key twice, an anchor, or bytes that are not UTF-8. YAML is read strictly: `no` is a word, 1e-5 a number.",
        "error: not valid YAML: the key 'r' appears twice (line 6): run.yaml",
        "Mend the line that the message names; save the file as UTF-8.",
    ),
    topic(
        "a value out of its bounds or choices",
        2,
        r"--?[\w-]+ is |^… is …|is given … times|is given \d+ times|is given twice|names a value twice|"
        r"is no (size|time|number|work)|are no seeds|is no axis|unknown (grid|preset)|no (linear layer|task|"
        r"device|GPU|command|parameter) is? ?(called|set)|no linear layer called|no target modules|the weight of|"
        r"lora is on or off|batch is micro-batch|layers asked for|--shards|there is no field|no column for|"
        r"make a chat together|says nothing with|no cell of the grid|nothing may follow|nothing was said|"
        r"no value of an axis|^… is empty|^--[\w-]+ is empty|no file is named|no page called|"
        r"'chat' is for|a plot is|has the form|an empty text",
        "An option or argument has a value that it cannot have, or is given more often than it takes. The message ends "
        "with what it may be.",
        "error: --temperature is -1.0: it must be at least 0",
        "Give one of the values that the message names, once; `llamatune VERB --help` lists all of them.",
    ),
    topic(
        "options that do not go together",
        2,
        r"exclude each other|needs the base's shape|numbers for … adapters|numbers for \d+ adapters|"
        r"not every adapter|it needs |belong together|(is|are) (of|for) .*(alone|directories|--)|"
        r"needs (two models|a model|an adapter|--)|needs the special|it is about |do not belong together|"
        r"says the rank|one at a time|is of training steps|says nothing of the memory|"
        r"a GGUF file is written whole|is for --|neither .* nor |\d+ specs|… specs|give one of|"
        r"named? the same file|name the same file|no run spec|nothing to try|is set by --|no row has a prompt|"
        r"no row files|no prompt|of … beams|is …, and |is for text rows|validation rows have no weight|"
        r"no room for windows|--variant|is another model than|the spec is planned for",
        "Two options contradict each other, or one is without effect without another. That is refused: what is asked "
        "for and then ignored would be a silent surprise.",
        "error: --stop and --num-beams exclude each other: leave one of them out",
        "Leave one out, or add the one that is missing, as the message says.",
    ),
    topic(
        "settings of a run that contradict each other",
        2,
        r"warm-up of|longer than the run|no validation (data|rows)|validation data to evaluate|pissa|olora|"
        r"rank … of a matrix|rank \d+ of a matrix|loses small updates|nothing would be trained|"
        r"is for frozen weights|needs momentum|quantized_cache|names .*which is none of",
        "Keys of the spec cannot be used together, as warm-up that is longer than the run, evaluation without "
        "validation rows, or quantised weights without a lora section.",
        "error: warm-up of 100 steps is longer than the run of 50: training.warmup_steps",
        "Change one of the keys that are named; KEY=null on the command line takes one of the file back.",
    ),
    topic(
        "an output that would replace or hide an input",
        2,
        r"would replace|is inside of|is another name of|is the file that|output directory contains|write to one "
        r"directory|the same (run|adapter) is given twice|output that is stdout",
        "An output must not be an input, hold one, or lie in an input directory; two outputs must not be one file.",
        "error: --output would replace ROWS: rows.jsonl: choose another output",
        "Choose another path for the output.",
    ),
    topic(
        "a path that cannot be expanded",
        2,
        r"NUL character|is for a shell|the variable |no home directory|variable in it holds",
        "In every path ~, ~user, $NAME and ${NAME} are expanded, and nothing else: a variable that is not set is an "
        "error, so that no file lands in / by mistake.",
        "error: the variable SCRATCH is not set: $SCRATCH/runs: set it, or write the path out",
        "Set the variable, or write the path out.",
    ),
    topic(
        "a template and rows or models that do not fit",
        2,
        r"template|for conversations|generation blocks|--format is|have no turns|its rows have no prompt|"
        r"rows with a prompt|no place for",
        "A template makes the prompt of a row or a chat. It must have a place for what the rows hold, and the "
        "tokenizer must have its special tokens.",
        "error: template 'alpaca' is for conversations, and alpaca rows have no turns",
        "Choose another --template; `prepare-data --preview 2` shows what is trained.",
    ),
    topic(
        "a run that was begun with another spec",
        2,
        r"the spec differs|this one began with|differs from the run's|its base is not the model|"
        r"rows of the run are not|in no run directory|run had no validation|is finished|begun with|spec of the run",
        "A run goes on only as it began: a change that alters results is refused, unless --allow-spec-change names it.",
        "error: the spec differs from the run's: training.learning_rate: 0.0002 -> 0.0001: runs/alpaca/spec.yaml",
        "Undo the change, name it with --allow-spec-change FIELD, or give another training.output_dir.",
    ),
    topic(
        "a device or GPUs that the job has not",
        2,
        r"need a GPU each|training.device is|the job has|GPUs a node|completions of this length|the ranks of a node",
        "The spec or the options ask for a device, or for completions, that this job or model cannot give.",
        "error: training.device is cpu, and the job has 2 GPUs a node: run.yaml: change the device",
        "Use device: auto, or ask for what there is.",
    ),
)
