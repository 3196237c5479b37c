"""Overrides that break a recipe, each with what is said of it (test_resolve_broken_recipes.py).

`FILE` is the recipe, «name» a folder of the test.
"""

ROWS: list[tuple[list[str], str]] = [
    (
        ["name="],
        "--set: name: given nothing; allowed: a name of a-z, 0-9, - and _, not a number alone, "
        "63 characters at most",
    ),
    (
        ["name=a b"],
        "--set: name: given 'a b'; allowed: a name of a-z, 0-9, - and _, not a number alone, "
        "63 characters at most",
    ),
    (
        ["name=null"],
        "--set: name: given nothing; allowed: a name of a-z, 0-9, - and _, not a number alone, "
        "63 characters at most",
    ),
    (
        ["nam=x"],
        "--set: nam: unknown key; did you mean 'name'?; allowed: name, seed, data, compute, stages, tracking",
    ),
    (
        ["seed=-1"],
        "--set: seed: given -1; allowed: greater than or equal to 0",
    ),
    (
        ["seed=x"],
        "--set: seed: given 'x'; allowed: a whole number",
    ),
    (
        ["seed=1.5"],
        "--set: seed: given 1.5; allowed: a whole number",
    ),
    (
        ["data.seq_len=0"],
        "--set: data.seq_len: given 0; allowed: greater than or equal to 8",
    ),
    (
        ["data.seq_len=65"],
        "FILE: stage assistant: rows are 65 tokens long, the teacher takes at most 64; give a "
        "smaller seq_len",
    ),
    (
        ["data.seq_len=many"],
        "--set: data.seq_len: given 'many'; allowed: a whole number",
    ),
    (
        ["data.held_out=1.5"],
        "--set: data.held_out: given 1.5; allowed: less than or equal to 0.5",
    ),
    (
        ["data.held_out=0"],
        "--set: data.held_out: given 0; allowed: greater than 0",
    ),
    (
        ["data.packing=sentence"],
        "--set: data.packing: given 'sentence'; allowed: 'full' or 'document'",
    ),
    (
        ["data.tokeniser=x"],
        "--set: data.tokeniser: unknown key; did you mean 'tokenizer'?; allowed: corpora, "
        "shards, tokens, source_tokenizer, fairseq_dict, encoder, text, tokenizer, seq_len, "
        "packing, held_out, text_field, source, options, window, cache, cache_gigabytes, "
        "on_corrupt, max_quarantined_share",
    ),
    (
        ["data.tokenizer=null"],
        "FILE:2: data: given a mapping; allowed: text: FILES with tokenizer: REFERENCE, the teacher's own",
    ),
    (
        ["data.text=null"],
        "FILE:2: data: given a mapping; allowed: either shards: FOLDER, tokens: PREFIX or a "
        "list of such, or text: FILES with tokenizer: REFERENCE",
    ),
    (
        ["data.shards=«shards»"],
        "FILE:2: data: given a mapping; allowed: either shards: FOLDER, tokens: PREFIX or a "
        "list of such, or text: FILES with tokenizer: REFERENCE",
    ),
    (
        ["data.window=0"],
        "--set: data.window: given 0; allowed: greater than or equal to 1",
    ),
    (
        ["data.on_corrupt=ignore"],
        "--set: data.on_corrupt: given 'ignore'; allowed: 'stop' or 'quarantine'",
    ),
    (
        ["data.max_quarantined_share=2"],
        "--set: data.max_quarantined_share: given 2; allowed: less than 1",
    ),
    (
        ["data.tokenizer=«other-tokenizer»"],
        "FILE: stage assistant: the data's vocabulary has 63 tokens, the teacher knows 61; "
        "make the data with the teacher's tokenizer",
    ),
    (
        ["data.tokenizer=«empty»"],
        "FILE: data: «empty» is not a model folder (no config.json in it); give a transformers "
        "folder, a hub id, models:/NAME@ALIAS, package:NAME/PATH or an earlier student's name",
    ),
    (
        ["data.cache_gigabytes=-1"],
        "--set: data.cache_gigabytes: given -1; allowed: greater than 0",
    ),
    (
        ["stages=[]"],
        "--set: stages: given []; allowed: at least 1 item",
    ),
    (
        ["stages.small.teacher=asistant"],
        "--set: stages.1.teacher: given 'asistant', no earlier student's name; did you mean "
        "'assistant'? (a hub id would be OWNER/NAME)",
    ),
    (
        ["stages.assistant.teacher=small"],
        "--set: stages.0.teacher: given 'small', a student defined only later; move the stage "
        "that makes it up, above this",
    ),
    (
        ["stages.small.teacher=small"],
        "--set: stages.1.teacher: given 'small', this stage's own student; allowed: a student "
        "of an earlier stage",
    ),
    (
        ["stages.small.name=assistant"],
        "FILE:20: stages.1.student.name: given 'assistant' a second time; allowed: a name for "
        "each student of the recipe\n--set: stages.1.name: given 'assistant' a second time; "
        "allowed: a name for each stage",
    ),
    (
        ["stages.assistant.teacher=«decoder»"],
        "FILE: stage assistant: this bert is configured as a decoder; distillation needs an encoder",
    ),
    (
        ["stages.assistant.teacher=«unknown»"],
        "FILE: stage assistant: cannot read the config of «unknown» (The checkpoint you are "
        "trying to load has model type `llama4all` but Transformers does not recognize this "
        "architecture. This could be because of an issue with the checkpoint, or because your "
        "version o…); give a folder with a config.json, or a hub id that this machine can reach",
    ),
    (
        ["stages.assistant.teacher=«gpt2»"],
        "FILE: stage assistant: architecture 'gpt2' has no tap; these have: bert, roberta, "
        "xlm-roberta, camembert, electra, distilbert, modernbert, eurobert, nomic_bert, mpnet",
    ),
    (
        ["stages.assistant.teacher=«broken»"],
        "FILE: stage assistant: cannot read the config of «broken» (It looks like the config "
        "file at '«broken»/config.json' is not a valid JSON file.); give a folder with a "
        "config.json, or a hub id that this machine can reach",
    ),
    (
        ["stages.assistant.teacher=«empty»"],
        "FILE: stage assistant: «empty» is not a model folder (no config.json in it); give a "
        "transformers folder, a hub id, models:/NAME@ALIAS, package:NAME/PATH or an earlier "
        "student's name",
    ),
    (
        ["stages.assistant.teacher=«short»"],
        "FILE: stage assistant: rows are 32 tokens long, the teacher takes at most 16; give a "
        "smaller seq_len",
    ),
    (
        ["stages.assistant.teacher=«small-vocabulary»"],
        "FILE: stage assistant: the data's vocabulary has 61 tokens, the teacher knows 20; "
        "make the data with the teacher's tokenizer",
    ),
    (
        ["stages.assistant.teacher=«other-tokenizer»"],
        "FILE: stage assistant: the data's tokenizer is another one than the teacher's in "
        "«other-tokenizer» (the same ids would mean other tokens); make the data with "
        "`--tokenizer «other-tokenizer»`",
    ),
    (
        ["stages.assistant.teacher=models:/x"],
        "--set: stages.0.teacher: given 'models:/x'; allowed: models:/NAME@ALIAS or models:/NAME/VERSION",
    ),
    (
        ["stages.assistant.teacher=ftp://x/y"],
        "--set: stages.0.teacher: given 'ftp://x/y'; allowed: an earlier student's name, "
        "models:/NAME@ALIAS, models:/NAME/VERSION, package:IMPORT_NAME/PATH, a folder (/…, "
        "./…, ../…, ~/…) or a hub id OWNER/NAME",
    ),
    (
        ["stages.assistant.teacher_layer=99"],
        'FILE: stage assistant: layer 99 does not exist; bert has layers 1 to 3, or "last"',
    ),
    (
        ["stages.assistant.teacher_layer=0"],
        "--set: stages.0.teacher_layer: given 0; allowed: last, or a layer's number counted from 1",
    ),
    (
        ["stages.small.teacher_layer=4"],
        "--set: stages.1.teacher_layer: given 4; allowed: 1 to 3, the layers of 'assistant', or last",
    ),
    (
        ["stages.assistant.teacher_layer=first"],
        "--set: stages.0.teacher_layer: given 'first'; allowed: last, or a layer's number counted from 1",
    ),
    (
        ["stages.assistant.student.layers=0"],
        "--set: stages.0.student.layers: given 0; allowed: greater than or equal to 1",
    ),
    (
        ["stages.assistant.student.layers=2.5"],
        "--set: stages.0.student.layers: given 2.5; allowed: a whole number",
    ),
    (
        ["stages.assistant.student.hidden=25"],
        "FILE: stage assistant: student 'assistant': 4 heads do not divide hidden size 25; "
        "give a multiple of 4, or other heads",
    ),
    (
        ["stages.small.student.hidden=25"],
        "FILE: stage small: student 'small': 4 heads do not divide hidden size 25; give a "
        "multiple of 4, or other heads",
    ),
    (
        ["stages.assistant.student.heads=5"],
        "FILE:22: stages.1.student.hidden: given 24; allowed: heads that divide hidden (24 / 5 "
        "is not whole); hidden: 25 would do\n--set: stages.0.student.heads: given 5; allowed: "
        "heads that divide hidden (24 / 5 is not whole); heads: 4 would do",
    ),
    (
        ["stages.assistant.student.heads=2"],
        "FILE: stage assistant: student 'assistant': the teacher has 4 heads and the student "
        "2; give both the same number, or set relation_heads to divide 48 and 24",
    ),
    (
        ["stages.small.student.heads=2"],
        "FILE: stage small: student 'small': the teacher has 4 heads and the student 2; give "
        "both the same number, or set relation_heads to divide 24 and 24",
    ),
    (
        ["stages.assistant.student.dropout=1"],
        "--set: stages.0.student.dropout: given 1; allowed: less than 1",
    ),
    (
        ["stages.assistant.student.init=teacher"],
        "--set: stages.0.student.init: given 'teacher'; allowed: random, teacher-layers, or a model to go on from: "
        "models:/NAME@ALIAS, models:/NAME/VERSION, a folder (/…, ./…, ../…, ~/…), package:IMPORT_NAME/PATH or a hub "
        "id OWNER/NAME",
    ),
    (
        ["stages.assistant.student.init=«teacher»"],
        "FILE: stage assistant: student 'assistant': given hidden: 24, and the model that it starts from has hidden: "
        "48; give hidden: 48",
    ),
    (
        ["stages.assistant.student.init=«modernbert»", "stages.assistant.student.hidden=48"],
        "FILE: stage assistant: student 'assistant': it starts from a modernbert and learns from a bert; start from a "
        "model of the teacher's family",
    ),
    (
        ["stages.assistant.student.init=teacher-layers", "stages.assistant.student.layers=4"],
        "FILE: stage assistant: student 'assistant': 4 student layers cannot start from 3 "
        "teacher layers; give 3 or fewer, or start at random",
    ),
    (
        ["stages.assistant.student.init=teacher-layers", "stages.assistant.student.hidden=96"],
        "FILE: stage assistant: student 'assistant': a hidden size of 96 cannot start from the "
        "teacher's 48; give 48 or less, or start at random",
    ),
    (
        ["stages.assistant.student.init=teacher-layers", "stages.assistant.student.ffn=400"],
        "FILE: stage assistant: student 'assistant': a feed-forward size of 400 cannot start "
        "from the teacher's 192; give 192 or less, or start at random",
    ),
    (
        [
            "stages.assistant.student.init=teacher-layers",
            "stages.assistant.student.heads=2",
            "stages.assistant.relation_heads=4",
        ],
        "FILE: stage assistant: student 'assistant': 2 student heads cannot start from 4 "
        "teacher heads; give both the same number",
    ),
    (
        ["stages.small.student.init=teacher-layers", "stages.small.student.layers=4"],
        "FILE: stage small: student 'small': 4 student layers cannot start from 3 teacher "
        "layers; give 3 or fewer, or start at random",
    ),
    (
        [
            "stages.assistant.teacher=«modernbert»",
            "stages.assistant.student.init=teacher-layers",
            "stages.assistant.student.hidden=96",
        ],
        "FILE: stage assistant: student 'assistant': a hidden size of 96 cannot start from the "
        "teacher's 48; give 48 or less, or start at random",
    ),
    (
        ["stages.assistant.teacher=«modernbert»", "stages.assistant.student.hidden=20"],
        "FILE: stage assistant: student 'assistant': hidden size 20 gives 4 heads of an odd "
        "size, 5, and modernbert rotates their dimensions in pairs; choose a multiple of 8",
    ),
    (
        ["stages.assistant.teacher=«modernbert»", "stages.assistant.student.layers=5"],
        "FILE: stage assistant: student 'assistant': a modernbert student has at most the "
        "layers of its teacher, 4, not 5",
    ),
    (
        ["stages.assistant.teacher=«modernbert»", "stages.assistant.teacher_layer=2"],
        "FILE: stage assistant: layer 2 of this modernbert attends to a window only; tap one "
        "that sees all: 1, 4",
    ),
    (
        ["stages.assistant.teacher=«mpnet»", "stages.assistant.relation_heads=6"],
        "FILE: stage assistant: student 'assistant': 6 relation heads cannot carry a position "
        "bias made for 4 heads; leave relation_heads out for q-k",
    ),
    (
        ["stages.assistant.objective=soft-label-mlm", "stages.assistant.teacher=«headless»"],
        "FILE: stage assistant: soft labels need a masked-language-model head, and the teacher "
        "has none; give a model that was saved with its head, or an objective of relations, "
        "such as minilm",
    ),
    (
        ["stages.small.objective=soft-label-mlm"],
        "FILE: stage small: soft labels need a masked-language-model head, and the teacher has "
        "none; give a model that was saved with its head, or an objective of relations, such "
        "as minilm",
    ),
    (
        ["stages.assistant.objective=layer-to-layer", "stages.assistant.student.layers=4"],
        "FILE: stage assistant: student 'assistant': it has 4 layers and the teacher 3 up to "
        "its tap; layer-to-layer needs a student that is not deeper",
    ),
    (
        ["stages.small.objective=layer-to-layer", "stages.small.student.layers=4"],
        "FILE: stage small: student 'small': it has 4 layers and the teacher 3 up to its tap; "
        "layer-to-layer needs a student that is not deeper",
    ),
    (
        ["stages.assistant.objective=mini"],
        "--set: stages.0.objective: given 'mini'; allowed: 'minilm', 'minilmv2', "
        "'attention-only', 'value-mse', 'layer-to-layer', 'soft-label-mlm' or "
        "'hidden-relation'; did you mean 'minilm'?",
    ),
    (
        ["stages.assistant.relation_heads=5"],
        "--set: stages.0.relation_heads: given 5; allowed: a divisor of assistant's hidden size 24",
    ),
    (
        ["stages.small.relation_heads=9"],
        "--set: stages.1.relation_heads: given 9; allowed: a divisor of the teacher's hidden "
        "size 24\n--set: stages.1.relation_heads: given 9; allowed: a divisor of small's hidden "
        "size 24",
    ),
    (
        ["stages.assistant.relations=[{name: a, x: q, y: z}]"],
        "--set: stages.0.relations.0.y: given 'z'; allowed: 'q', 'k', 'v' or 'hidden'",
    ),
    (
        ["stages.assistant.reduction=exact"],
        "--set: stages.0.reduction: given 'exact'; allowed: 'sequence' or 'token'",
    ),
    (
        ["stages.assistant.batch=10"],
        "FILE:29: compute.micro_batch: given 4; allowed: a divisor of the batch 10 of stage "
        "'assistant'; 2 would do",
    ),
    (
        ["stages.assistant.micro_batch=3"],
        "--set: stages.0.micro_batch: given 3; allowed: a divisor of the batch 8 of stage "
        "'assistant'; 2 would do",
    ),
    (
        ["stages.assistant.steps=0"],
        "--set: stages.0.steps: given 0; allowed: greater than or equal to 1",
    ),
    (
        ["stages.assistant.warmup_steps=40"],
        "--set: stages.0.warmup_steps: given 40; allowed: fewer than the stage's 40 steps",
    ),
    (
        ["stages.assistant.peak_lr=0"],
        "--set: stages.0.peak_lr: given 0; allowed: greater than 0",
    ),
    (
        ["stages.assistant.peak_lr=fast"],
        "--set: stages.0.peak_lr: given 'fast'; allowed: a number",
    ),
    (
        ["stages.assistant.schedule=step"],
        "--set: stages.0.schedule: given 'step'; allowed: 'linear', 'cosine' or 'constant'",
    ),
    (
        ["stages.assistant.adam_betas=[0.9]"],
        "--set: stages.0.adam_betas.1: missing; add it",
    ),
    (
        ["stages.assistant.lr=1e-4"],
        "--set: stages.0.lr: unknown key; did you mean 'peak_lr'?; allowed: name, teacher, "
        "teacher_layer, student, students, objective, relations, relation_heads, reduction, "
        "batch, micro_batch, steps, peak_lr, warmup_steps, schedule, adam_betas, adam_eps, "
        "weight_decay, max_gradient_norm, eval_every, held_out_rows",
    ),
    (
        ["stages.assistant.eval_every=0"],
        "--set: stages.0.eval_every: given 0; allowed: greater than or equal to 1",
    ),
    (
        ["compute.workers=3"],
        "--set: compute.workers: given 3; allowed: at most 2, the micro-batches of a step (8 / "
        "4) of stage 'assistant'\n--set: compute.workers: given 3; allowed: at most 2, the "
        "micro-batches of a step (8 / 4) of stage 'small'",
    ),
    (
        ["compute.workers=[2, 1]"],
        "--set: compute.workers: given [2, 1]; allowed: a number of at least 1, or [LEAST, "
        "MOST] for a run that grows and shrinks",
    ),
    (
        ["compute.workers=0"],
        "--set: compute.workers: given 0; allowed: a number of at least 1, or [LEAST, MOST] "
        "for a run that grows and shrinks",
    ),
    (
        ["compute.device=gpu"],
        "--set: compute.device: given 'gpu'; allowed: 'auto', 'cpu' or 'cuda'",
    ),
    (
        ["compute.precision=float16"],
        "--set: compute.precision: given 'float16'; allowed: 'auto', 'float32' or 'bfloat16'; "
        "did you mean 'bfloat16'?",
    ),
    (
        ["compute.reduction=exact"],
        "--set: compute.reduction: this key is called gradient_sum now, with the same values; rename it",
    ),
    (
        ["compute.gradient_sum=slow"],
        "--set: compute.gradient_sum: given 'slow'; allowed: 'exact' or 'fast'",
    ),
    (
        ["compute.checkpoints=ftp://x"],
        "--set: compute.checkpoints: given 'ftp://x'; allowed: a folder, s3://BUCKET/PREFIX or "
        "gs://BUCKET/PREFIX",
    ),
    (
        ["compute.threads=0"],
        "--set: compute.threads: given 0; allowed: greater than or equal to 1",
    ),
    (
        ["compute.micro_batch=5"],
        "--set: compute.micro_batch: given 5; allowed: a divisor of the batch 8 of stage "
        "'assistant'; 4 would do\n--set: compute.micro_batch: given 5; allowed: a divisor of "
        "the batch 8 of stage 'small'; 4 would do",
    ),
    (
        ["tracking.alias=a b"],
        "--set: tracking.alias: given 'a b'; allowed: a name of a-z, 0-9, - and _, not a "
        "number alone, 63 characters at most",
    ),
    (
        ["tracking.log_every=0"],
        "--set: tracking.log_every: given 0; allowed: greater than or equal to 1",
    ),
    (
        ["tracking=7"],
        "--set: tracking: given 7; allowed: a mapping of KEY: VALUE lines",
    ),
    (
        ["comput.workers=1"],
        "FILE:1: comput: unknown key; did you mean 'compute'?; allowed: name, seed, data, "
        "compute, stages, tracking",
    ),
]
