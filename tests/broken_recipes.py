"""Overrides that break a recipe, each with what is said of it, and what a reader makes of it.

Of test_resolve_broken_recipes.py. `FILE` is the recipe, «name» a folder or file of the test.
"""

ROWS: list[tuple[list[str], str]] = [
    (
        ["name="],
        "--set: name: given nothing; allowed: a name of a-z, 0-9, - and _, not a number alone, 63"
        " characters at most",
    ),
    (
        ["name=a b"],
        "--set: name: given 'a b'; allowed: a name of a-z, 0-9, - and _, not a number alone, 63 "
        "characters at most",
    ),
    (
        ["name=null"],
        "--set: name: given nothing; allowed: a name of a-z, 0-9, - and _, not a number alone, 63"
        " characters at most",
    ),
    (
        ["nam=x"],
        "--set: nam: unknown key; did you mean 'name'?; allowed: name, seed, data, compute, stages, "
        "evaluation, promote, card, tracking, extends, vars",
    ),
    (
        ["seed=-1"],
        "--set: seed: given -1; allowed: a whole number from 0 to 2^63 - 1",
    ),
    (
        ["seed=x"],
        "--set: seed: given 'x'; allowed: a whole number from 0 to 2^63 - 1",
    ),
    (
        ["seed=1.5"],
        "--set: seed: given 1.5; allowed: a whole number from 0 to 2^63 - 1",
    ),
    (
        ["data.seq_len=0"],
        "--set: data.seq_len: given 0; allowed: a whole number from 8 to 65536",
    ),
    (
        ["data.seq_len=65"],
        "FILE: stage assistant: rows are 65 tokens long, the teacher takes at most 64; give a "
        "smaller seq_len",
    ),
    (
        ["data.seq_len=many"],
        "--set: data.seq_len: given 'many'; allowed: a whole number from 8 to 65536",
    ),
    (
        ["data.held_out=1.5"],
        "--set: data.held_out: given 1.5; allowed: a number above 0, at most 0.5",
    ),
    (
        ["data.held_out=0"],
        "--set: data.held_out: given 0; allowed: a number above 0, at most 0.5",
    ),
    (
        ["data.packing=sentences"],
        "--set: data.packing: given 'sentences'; allowed: 'full', 'masked', 'document' or 'sentence'; "
        "did you mean 'sentence'?",
    ),
    (
        ["data.language=German", "data.packing=sentence"],
        "--set: data.language: given 'German'; allowed: a language's code, as en, de or pt-br",
    ),
    (
        ["data.language=de"],
        "FILE:2: data: given the keys text, tokenizer, seq_len, held_out, language; allowed: language with packing: "
        "sentence; leave language out, or change packing",
    ),
    (
        ["data.tokeniser=x"],
        "--set: data.tokeniser: unknown key; did you mean 'tokenizer'?; allowed: corpora, "
        "shards, tokens, source_tokenizer, fairseq_dict, encoder, text, tokenizer, seq_len, "
        "packing, language, held_out, text_field, line_documents, invalid_utf8, csv_separator, csv_header, "
        "csv_quoting, csv_ragged, special_tokens, allow_skipped, source, options, window, cache, cache_gigabytes, "
        "on_corrupt, max_quarantined_share",
    ),
    (
        ["data.tokenizer=null"],
        "FILE:2: data: given the keys text, seq_len, held_out; allowed: text: FILES with "
        "tokenizer: REFERENCE, the teacher's own",
    ),
    (
        ["data.text=null"],
        "FILE:2: data: given the keys tokenizer, seq_len, held_out; allowed: either shards: "
        "FOLDER, tokens: PREFIX or a list of such, or text: FILES with tokenizer: REFERENCE",
    ),
    (
        ["data.shards=«shards»"],
        "FILE:2: data: given the keys text, tokenizer, seq_len, held_out, shards; allowed: either"
        " shards: FOLDER, tokens: PREFIX or a list of such, or text: FILES with tokenizer: "
        "REFERENCE",
    ),
    (
        ["data.window=0"],
        "--set: data.window: given 0; allowed: a whole number from 1 to 1e9",
    ),
    (
        ["data.on_corrupt=ignore"],
        "--set: data.on_corrupt: given 'ignore'; allowed: 'stop' or 'quarantine'",
    ),
    (
        ["data.max_quarantined_share=2"],
        "--set: data.max_quarantined_share: given 2; allowed: a number of at least 0 and below 1",
    ),
    (
        ["data.tokenizer=«other-tokenizer»"],
        "FILE: stage assistant: the data's vocabulary has 63 tokens, the teacher knows 61; make "
        "the data with the teacher's tokenizer (data.tokenizer: «teacher»)",
    ),
    (
        ["data.tokenizer=«empty»"],
        "FILE: data: «empty» is not a model folder (no config.json in it); give a transformers "
        "folder, a hub id, models:/NAME@ALIAS, package:NAME/PATH or an earlier student's name",
    ),
    (
        ["data.cache_gigabytes=-1"],
        "--set: data.cache_gigabytes: given -1; allowed: a number above 0, at most 1e9",
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
        "--set: stages.0.teacher: given 'small', and so a cycle of teachers: small → assistant → "
        "small; allowed in one of these stages: a teacher from elsewhere, as OWNER/NAME or "
        "./FOLDER",
    ),
    (
        ["stages.small.teacher=small"],
        "--set: stages.1.teacher: given 'small', this stage's own student; allowed: a student of "
        "an earlier stage",
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
        "FILE: stage assistant: cannot read the config of «broken» (It looks like the config file"
        " at '«broken»/config.json' is not a valid JSON file.); give a folder with a config.json,"
        " or a hub id that this machine can reach",
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
        "FILE: stage assistant: the data's vocabulary has 61 tokens, the teacher knows 20; make "
        "the data with the teacher's tokenizer (data.tokenizer: «small-vocabulary»)",
    ),
    (
        ["stages.assistant.teacher=«other-tokenizer»"],
        "FILE: stage assistant: the data's tokenizer is another one than the teacher's in "
        "«other-tokenizer» (the same ids would mean other tokens); give that as data.tokenizer, or "
        "make the data with `--tokenizer «other-tokenizer»`",
    ),
    (
        ["stages.assistant.teacher=models:/x"],
        "--set: stages.0.teacher: given 'models:/x'; allowed: models:/NAME@ALIAS or models:/NAME/VERSION",
    ),
    (
        ["stages.assistant.teacher=ftp://x/y"],
        "--set: stages.0.teacher: given 'ftp://x/y'; allowed: an earlier student's name, "
        "models:/NAME@ALIAS, models:/NAME/VERSION, package:IMPORT_NAME/PATH, a folder (/…, ./…, "
        "../…, ~/…) or a hub id OWNER/NAME",
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
        "--set: stages.0.student.layers: given 0; allowed: a whole number from 1 to 1000",
    ),
    (
        ["stages.assistant.student.layers=2.5"],
        "--set: stages.0.student.layers: given 2.5; allowed: a whole number from 1 to 1000",
    ),
    (
        ["stages.assistant.student.hidden=25"],
        "FILE: stage assistant: student 'assistant': 4 heads do not divide hidden size 25; give a"
        " multiple of 4, or with relation_heads other heads",
    ),
    (
        ["stages.small.student.hidden=25"],
        "FILE: stage small: student 'small': 4 heads do not divide hidden size 25; give a "
        "multiple of 4, or with relation_heads other heads",
    ),
    (
        ["stages.assistant.student.heads=5"],
        "--set: stages.0.student.heads: given 5; allowed: heads that divide hidden (24 / 5 is not"
        " whole); hidden: 25 would do if the teacher has 5 heads; if not, leave heads out",
    ),
    (
        ["stages.assistant.student.heads=2"],
        "FILE: stage assistant: student 'assistant': the teacher has 4 heads and the student 2; "
        "give both the same number, or set relation_heads to divide 48 and 24",
    ),
    (
        ["stages.small.student.heads=2"],
        "FILE: stage small: student 'small': the teacher has 4 heads and the student 2; give both"
        " the same number, or set relation_heads to divide 24 and 24",
    ),
    (
        ["stages.assistant.student.dropout=1"],
        "--set: stages.0.student.dropout: given 1; allowed: a number of at least 0 and below 1",
    ),
    (
        ["stages.assistant.student.init=teacher"],
        "--set: stages.0.student.init: given 'teacher'; allowed: random, teacher-layers, teacher-pca, or a model to go "
        "on from: an earlier student's name, models:/NAME@ALIAS, models:/NAME/VERSION, a folder (/…, ./…, ../…, "
        "~/…), package:IMPORT_NAME/PATH or a hub id OWNER/NAME; did you mean 'teacher-layers'?",
    ),
    (
        ["stages.assistant.objective=embedding", "stages.assistant.teacher=«embedder»"],
        "FILE:2: data.packing: given 'full'; allowed: sentence or document, because stage 'assistant' "
        "compares the vectors of whole texts (objective: embedding)",
    ),
    (
        [
            "stages.assistant.objective=embedding",
            "stages.assistant.teacher=«embedder»",
            "data.packing=masked",
        ],
        "--set: data.packing: given 'masked'; allowed: sentence or document, because stage 'assistant' "
        "compares the vectors of whole texts (objective: embedding)",
    ),
    (
        [
            "stages.assistant.objective=embedding",
            "stages.assistant.teacher=«embedder»",
            "data={shards: «shards»}",
        ],
        "FILE: stage assistant: objective embedding compares the vectors of whole texts, and the data's rows "
        "hold several (packing full); make the data from the text with --packing sentence, or "
        "document",
    ),
    (
        ["stages.assistant.objective=embedding", "data.packing=sentence"],
        "FILE: stage assistant: the teacher «teacher» does not say how its vectors are pooled (it has no "
        "modules.json); give a sentence-transformers model, or embedding: {pooling: mean} (or cls) in the "
        "stage, if it was trained to be pooled so",
    ),
    (
        [
            "stages.assistant.objective=embedding",
            "data.packing=sentence",
            "stages.assistant.teacher=«embedder»",
            "stages.assistant.embedding.dims=[96, 48]",
        ],
        "FILE: stage assistant: dims [96, 48]: the teacher's vectors have 48 numbers, and the first of dims "
        "is all of them; give dims: [48]",
    ),
    (
        [
            "stages.assistant.objective=embedding",
            "data.packing=sentence",
            "stages.assistant.teacher=«embedder»",
            "stages.assistant.embedding.dims=[24]",
        ],
        "FILE: stage assistant: dims [24]: the teacher's vectors have 48 numbers, and the first of dims is "
        "all of them; give dims: [48, 24]",
    ),
    (
        [
            "stages.assistant.objective=embedding",
            "data.packing=sentence",
            "stages.assistant.teacher=«embedder»",
            "stages.assistant.embedding.dense=false",
        ],
        "FILE: stage assistant: student 'assistant' has a hidden size of 24 and the teacher's vectors 48 "
        "numbers, with dense: false; leave dense out, or give hidden: 48",
    ),
    (
        ["stages.assistant.student.vocabulary={keep: 100}"],
        "--set: stages.0.student.vocabulary: unknown key; a smaller vocabulary is that of a teacher: make one with "
        "minilm shrink, and give its folder as teacher and data.tokenizer",
    ),
    (
        ["stages.assistant.embedding.dense=maybe"],
        "--set: stages.0.embedding.dense: given 'maybe'; allowed: true or false",
    ),
    (
        ["stages.assistant.embedding.pooling=cls"],
        "FILE:8: stages.0.embedding: given with objective: minilm; allowed with objective: embedding; change "
        "that, or leave these keys out",
    ),
    (
        [
            "stages.assistant.objective=embedding",
            "data.packing=sentence",
            "stages.assistant.teacher=«embedder»",
            "stages.assistant.relation_heads=4",
            "stages.assistant.reduction=token",
        ],
        "--set: stages.0.relation_heads: given with objective: embedding, which compares whole vectors of the"
        " last layers; leave it out\n"
        "--set: stages.0.reduction: given with objective: embedding, which compares whole vectors of the last"
        " layers; leave it out",
    ),
    (
        ["data.packing=sentence", "stages.small.objective=embedding"],
        "FILE:19: stages.1.teacher: given 'assistant', whose vectors mean nothing: its stage 'assistant' "
        "trains relations; allowed: a model that embeds texts (to start from it: init: assistant)",
    ),
    (
        ["stages.small.student.init=asistant"],
        "--set: stages.1.student.init: given 'asistant'; allowed: random, teacher-layers, teacher-pca, or a model to "
        "go on from: an earlier student's name, models:/NAME@ALIAS, models:/NAME/VERSION, a folder (/…, ./…, ../…,"
        " ~/…), package:IMPORT_NAME/PATH or a hub id OWNER/NAME; did you mean 'assistant'?",
    ),
    (
        ["stages.small.student.init=assistant"],
        "FILE:21: stages.1.student.layers: given 1; allowed: 3, as of the student 'assistant' that it starts "
        "from",
    ),
    (
        ["stages.assistant.student.init=small"],
        "--set: stages.0.student.init: given 'small', a student defined only later; move the stage that makes"
        " it (small) up, above this",
    ),
    (
        ["stages.small.student.init=small"],
        "--set: stages.1.student.init: given 'small', of this stage itself; allowed: a student of an earlier "
        "stage",
    ),
    (
        [
            "stages.assistant.objective=embedding",
            "data.packing=sentence",
            "stages.assistant.teacher=«embedder»",
            "stages.assistant.student.init=«dense-96»",
            "stages.assistant.student.hidden=48",
        ],
        "FILE: stage assistant: student 'assistant': the model that it starts from has a dense layer to 96 "
        "numbers, and the teacher's vectors have 48; start from a model without (a copy of it without "
        "modules.json)",
    ),
    (
        [
            "stages.assistant.objective=embedding",
            "data.packing=sentence",
            "stages.assistant.teacher=«last-token»",
        ],
        "FILE: stage assistant: «last-token»/1_Pooling/config.json pools by lasttoken; use a model that pools"
        " by one of mean, cls, max, mean_sqrt_len_tokens",
    ),
    (
        ["data.packing=sentence", "data.source=megatron"],
        "FILE: data: source 'megatron' holds token ids, and packing 'sentence' splits text; give the text "
        "that they were made of, or packing document",
    ),
    (
        ["stages.assistant.student.init=«teacher»"],
        "FILE: stage assistant: student 'assistant': given hidden: 24, and the model that it starts from has hidden: "
        "48; give hidden: 48",
    ),
    (
        ["stages.assistant.student.init=«modernbert»", "stages.assistant.student.hidden=48"],
        "FILE: stage assistant: student 'assistant': it starts from a modernbert and learns from a bert; start from a "
        "model of the teacher's family (only objective: embedding takes any)",
    ),
    (
        ["stages.assistant.student.init=teacher-layers", "stages.assistant.student.layers=4"],
        "FILE: stage assistant: student 'assistant': 4 student layers cannot start from 3 teacher"
        " layers; give 3 or fewer, or start at random",
    ),
    (
        ["stages.assistant.student.init=teacher-layers", "stages.assistant.student.hidden=96"],
        "FILE: stage assistant: student 'assistant': a hidden size of 96 cannot start from the "
        "teacher's 48; give 48 or less, or start at random",
    ),
    (
        ["stages.assistant.student.init=teacher-layers", "stages.assistant.student.ffn=400"],
        "FILE: stage assistant: student 'assistant': a feed-forward size of 400 cannot start from"
        " the teacher's 192; give 192 or less, or start at random",
    ),
    (
        [
            "stages.assistant.student.init=teacher-layers",
            "stages.assistant.student.heads=2",
            "stages.assistant.relation_heads=4",
        ],
        "FILE: stage assistant: student 'assistant': 2 student heads cannot start from 4 teacher "
        "heads; give both the same number",
    ),
    (
        ["stages.small.student.init=teacher-layers", "stages.small.student.layers=4"],
        "FILE: stage small: student 'small': 4 student layers cannot start from 3 teacher layers;"
        " give 3 or fewer, or start at random",
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
        "FILE: stage assistant: student 'assistant': hidden size 20 gives 4 heads of an odd size,"
        " 5, and modernbert rotates their dimensions in pairs; choose a multiple of 8",
    ),
    (
        ["stages.assistant.teacher=«modernbert»", "stages.small.student.hidden=20"],
        "FILE: stage small: student 'small': hidden size 20 gives 4 heads of an odd size, 5, "
        "and modernbert rotates their dimensions in pairs; choose a multiple of 8",
    ),
    (
        ["stages.small.student.init=teacher-layers", "stages.small.student.hidden=48"],
        "FILE: stage small: student 'small': a hidden size of 48 cannot start from the "
        "teacher's 24; give 24 or less, or start at random",
    ),
    (
        ["stages.assistant.student.positions=teacher"],
        "FILE: stage assistant: student 'assistant': its table of positions is 24 wide and the "
        "teacher's 48, so none can be copied; give hidden: 48, or positions: cut",
    ),
    (
        ["stages.assistant.student.start_share=0.5"],
        "--set: stages.0.student.start_share: given 0.5 with init: random, a start that has learned nothing; allowed: "
        "0; leave it out, or give another init",
    ),
    (
        ["stages.assistant.student.start_share=1", "stages.assistant.student.init=teacher-layers"],
        "--set: stages.0.student.start_share: given 1; allowed: a number of at least 0 and below 1",
    ),
    (
        ["stages.assistant.student.positions=crop"],
        "--set: stages.0.student.positions: given 'crop'; allowed: 'cut', 'teacher' or 'keep'",
    ),
    (
        ["stages.assistant.teacher=«modernbert»", "stages.assistant.student.layers=5"],
        "FILE: stage assistant: student 'assistant': a modernbert student has at most the layers "
        "of its teacher, 4, not 5",
    ),
    (
        ["stages.assistant.teacher=«modernbert»", "stages.assistant.teacher_layer=2"],
        "FILE: stage assistant: layer 2 of this modernbert attends to a window only; tap one that"
        " sees all: 1, 4",
    ),
    (
        ["stages.assistant.teacher=«mpnet»", "stages.assistant.relation_heads=6"],
        "FILE: stage assistant: student 'assistant': 6 relation heads cannot carry a position "
        "bias made for 4 heads; leave relation_heads out for q-k",
    ),
    (
        ["stages.assistant.objective=soft-label-mlm", "stages.assistant.teacher=«headless»"],
        "FILE: stage assistant: soft labels need a masked-language-model head, and the teacher "
        "has none; give a model that was saved with its head, or an objective of relations, such "
        "as minilm",
    ),
    (
        ["stages.small.objective=soft-label-mlm"],
        "FILE: stage small: soft labels need a masked-language-model head, and the teacher has "
        "none; give a model that was saved with its head, or an objective of relations, such as "
        "minilm",
    ),
    (
        ["stages.assistant.objective=layer-to-layer", "stages.assistant.student.layers=4"],
        "FILE: stage assistant: student 'assistant': it has 4 layers and the teacher 3 up to its "
        "tap; layer-to-layer needs a student that is not deeper",
    ),
    (
        ["stages.small.objective=layer-to-layer", "stages.small.student.layers=4"],
        "FILE: stage small: student 'small': it has 4 layers and the teacher 3 up to its tap; "
        "layer-to-layer needs a student that is not deeper",
    ),
    (
        ["stages.assistant.objective=mini"],
        "--set: stages.0.objective: given 'mini'; allowed: 'minilm', 'minilmv2', "
        "'attention-only', 'value-mse', 'layer-to-layer', 'soft-label-mlm', 'embedding' or 'hidden-relation'; "
        "did you mean 'minilm'?",
    ),
    (
        ["stages.assistant.relation_heads=5"],
        "--set: stages.0.relation_heads: given 5; allowed: a number that divides all hidden sizes"
        " (assistant 24); 4 would do",
    ),
    (
        ["stages.small.relation_heads=9"],
        "--set: stages.1.relation_heads: given 9; allowed: a number that divides all hidden sizes"
        " (small 24, assistant 24); 8 would do",
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
        "--set: stages.0.steps: given 0; allowed: a whole number from 1 to 1e9",
    ),
    (
        ["stages.assistant.warmup_steps=40"],
        "--set: stages.0.warmup_steps: given 40; allowed: fewer than the stage's 40 steps",
    ),
    (
        ["stages.assistant.peak_lr=0"],
        "--set: stages.0.peak_lr: given 0; allowed: a number above 0, at most 1; Adam moves a "
        "weight by about so much a step, and most recipes have 1e-4 to 1e-3",
    ),
    (
        ["stages.assistant.peak_lr=fast"],
        "--set: stages.0.peak_lr: given 'fast'; allowed: a number above 0, at most 1; Adam moves "
        "a weight by about so much a step, and most recipes have 1e-4 to 1e-3",
    ),
    (
        ["stages.assistant.schedule=step"],
        "--set: stages.0.schedule: given 'step'; allowed: 'linear', 'cosine', 'constant' or 'wsd'",
    ),
    (
        ["stages.assistant.adam_betas=[0.9]"],
        "--set: stages.0.adam_betas: given [0.9]; allowed: two numbers of at least 0 and below 1,"
        " as [0.9, 0.999]",
    ),
    (
        ["stages.assistant.lr=1e-4"],
        "--set: stages.0.lr: unknown key; did you mean 'peak_lr'?; allowed: name, teacher, "
        "assistant, teacher_layer, student, students, objective, embedding, relations, relation_heads, reduction, "
        "batch, micro_batch, steps, peak_lr, warmup_steps, schedule, decay_steps, adam_betas, adam_eps, "
        "weight_decay, max_gradient_norm, eval_every, held_out_rows, evaluate, until",
    ),
    (
        ["stages.assistant.eval_every=0"],
        "--set: stages.0.eval_every: given 0; allowed: a whole number from 1 to 1e9",
    ),
    (
        ["compute.workers=3"],
        "--set: compute.workers: given 3; allowed: at most 2, the micro-batches of a step (8 / 4)"
        " of stage 'assistant'\n--set: compute.workers: given 3; allowed: at most 2, the "
        "micro-batches of a step (8 / 4) of stage 'small'",
    ),
    (
        ["compute.workers=[2, 1]"],
        "--set: compute.workers: given [2, 1]; allowed: auto, a number of at least 1, or [LEAST, MOST] "
        "for a run that grows and shrinks",
    ),
    (
        ["compute.workers=0"],
        "--set: compute.workers: given 0; allowed: auto, a number of at least 1, or [LEAST, MOST] for a"
        " run that grows and shrinks",
    ),
    (
        ["compute.device=gpu"],
        "--set: compute.device: given 'gpu'; allowed: 'auto', 'cpu' or 'cuda'",
    ),
    (
        ["compute.precision=float16"],
        "--set: compute.precision: given 'float16'; allowed: 'auto', 'float32' or 'bfloat16'; did"
        " you mean 'bfloat16'?",
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
        "--set: compute.threads: given 0; allowed: auto, or a whole number from 1 to 4096",
    ),
    (
        ["compute.micro_batch=5"],
        "--set: compute.micro_batch: given 5; allowed: a divisor of the batch 8 of stage "
        "'assistant'; 4 would do\n--set: compute.micro_batch: given 5; allowed: a divisor of the "
        "batch 8 of stage 'small'; 4 would do",
    ),
    (
        ["tracking.alias=a b"],
        "--set: tracking.alias: given 'a b'; allowed: a name of a-z, 0-9, - and _, not a number "
        "alone, 63 characters at most",
    ),
    (
        ["tracking.log_every=0"],
        "--set: tracking.log_every: given 0; allowed: a whole number from 1 to 1e9",
    ),
    (
        ["tracking=7"],
        "--set: tracking: given 7; allowed: a mapping of KEY: VALUE lines",
    ),
    (
        ["comput.workers=1"],
        "FILE:1: comput: unknown key; did you mean 'compute'?; allowed: name, seed, data, "
        "compute, stages, evaluation, promote, card, tracking, extends, vars",
    ),
    (
        ["stages.assistant.peak_lr=100"],
        "--set: stages.0.peak_lr: given 100; allowed: a number above 0, at most 1; Adam moves a "
        "weight by about so much a step, and most recipes have 1e-4 to 1e-3",
    ),
    (
        ["stages.assistant.steps=1e30"],
        "--set: stages.0.steps: given 1e+30; allowed: a whole number from 1 to 1e9",
    ),
    (
        ["stages.assistant.steps='400,000'"],
        "--set: stages.0.steps: given '400,000'; allowed: a whole number from 1 to 1e9",
    ),
    (
        ["stages.assistant.batch=true"],
        "--set: stages.0.batch: given true; allowed: a whole number from 1 to 1e9",
    ),
    (
        ["stages.assistant.student.hidden=1e9"],
        "--set: stages.0.student.hidden: given 1000000000.0; allowed: a whole number from 1 to 1048576",
    ),
    (
        ["compute.stall_seconds=1e300"],
        "--set: compute.stall_seconds: given 1e+300; allowed: seconds, above 0 and at most 31536000 (a year)",
    ),
    (
        ["compute.wait_seconds=-1"],
        "--set: compute.wait_seconds: given -1; allowed: seconds, from 0 to 31536000 (a year)",
    ),
    (
        ["data.text=${NO_SUCH}/text.txt"],
        "--set: data.text: the variable NO_SUCH has no value; give it in the environment, under vars, by "
        "--set vars.NO_SUCH=VALUE or with a default: ${NO_SUCH:-VALUE}",
    ),
    (
        ["stages.assistant.teacher=$HOME/teacher"],
        "--set: stages.0.teacher: given '$HOME/teacher'; only variables in braces have values, as ${HOME}; "
        "write the value, or ${HOME}",
    ),
    (
        ["compute.checkpoints=s3://${BUCKET}/x"],
        "--set: compute.checkpoints: the variable BUCKET has no value; give it in the environment, under vars, "
        "by --set vars.BUCKET=VALUE or with a default: ${BUCKET:-VALUE}",
    ),
    (
        ["stages.assistant.steps=${STEPS}"],
        "--set: stages.0.steps: the variable STEPS has no value; give it in the environment, under vars, by "
        "--set vars.STEPS=VALUE or with a default: ${STEPS:-VALUE}",
    ),
    (
        ["stages.assistant.teacher=small", "stages.small.teacher=«teacher»"],
        "--set: stages.0.teacher: given 'small', a student defined only later; move the stage "
        "that makes it (small) up, above this",
    ),
    (
        ["data.held_out=0.0001"],
        "FILE: data: the held-out split has 0 documents with 0 tokens, less than one row of 32; "
        "give more text or a larger held_out",
    ),
    (
        ["data.text=«one-word»"],
        "FILE: data: the text has 1 document with 2 tokens, less than one row of 32; give more text",
    ),
    (
        ["data.text=«one-word»", "data.packing=document"],
        "FILE: data: the held-out split has 0 documents with 0 tokens, less than one row of 32; "
        "give more text or a larger held_out",
    ),
    (
        ["data.text=«latin»"],
        "FILE: data: text '«latin»' is not UTF-8 at byte 3 (b'\\xe9\\n'); "
        "convert it first, for instance with iconv -t UTF-8, or have such bytes replaced and counted: "
        "--invalid-utf8 replace (in a recipe data.invalid_utf8: replace)",
    ),
    (
        ["data.text=«empty-text»"],
        "FILE: data: text '«empty-text»' is empty (0 bytes), and so is all that was given; give a file with text in it",
    ),
    (
        ["data.text_field=txt", "data.text=«records»"],
        "FILE: data: text '«records»' has no text in field 'txt', nor has any other file; its string fields "
        "are id, text: name one of them as text field",
    ),
    (
        ["stages.assistant.student={layers: 3, hiden: 24}"],
        "--set: stages.0.student.hidden: missing; add it (Hidden size)\n--set: "
        "stages.0.student.hiden: unknown key; did you mean 'hidden'?; allowed: name, layers, "
        "hidden, ffn, heads, dropout, init, start_share, positions",
    ),
    (
        ["stages.assistant.student={layers:3, hidden:24}"],
        "--set: stages.0.student.layers: missing; add it (Transformer layers)\n--set: "
        "stages.0.student.hidden: missing; add it (Hidden size)\n--set: stages.0.student.layers:3:"
        " unknown key; write layers: 3, with a colon and a space\n--set: "
        "stages.0.student.hidden:24: unknown key; write hidden: 24, with a colon and a space",
    ),
    (
        ["stages.assistant.student=3x24"],
        "--set: stages.0.student: given '3x24'; allowed: a mapping of KEY: VALUE lines",
    ),
    (
        ["stages.assistant.students=[{name: a, layers: 3, hidden: 24}]"],
        "FILE:8: stages.0: given the keys name, teacher, student, batch, steps, peak_lr, "
        "warmup_steps, held_out_rows, students; allowed: student: (one) or students: (a list), "
        "not both",
    ),
    (
        ["stages.assistant.student.heads=7", "stages.assistant.student.hidden=385"],
        "FILE:22: stages.1.student.hidden: given 24; allowed: heads that divide hidden (24 / 7 is"
        " not whole); hidden: 21 would do",
    ),
    (
        ["stages.small.student.heads=5"],
        "--set: stages.1.student.heads: given 5; allowed: heads that divide hidden (24 / 5 is not"
        " whole); hidden: 25 would do if the teacher has 5 heads; if not, leave heads out",
    ),
    (
        ["stages.assistant.teacher=«modernbert»", "stages.assistant.student.hidden=21"],
        "FILE: stage assistant: student 'assistant': 4 heads do not divide hidden size 21; give a"
        " multiple of 8, or with relation_heads other heads",
    ),
    (
        ["stages.assistant.teacher=«mpnet»", "stages.assistant.student.heads=2"],
        "FILE: stage assistant: student 'assistant': the teacher has 4 heads and the student 2; "
        "give both the same number",
    ),
    (
        ["compute.micro_batch=3", "stages.assistant.batch=6", "stages.small.batch=8"],
        "--set: compute.micro_batch: given 3; allowed: a divisor of the batch 8 of stage 'small'; 2 would do",
    ),
    (
        ["stages.assistant.relations=[{name: a, x: q}]"],
        "--set: stages.0.relations.0.y: missing; add it (What x is multiplied by: q, k, v or hidden)",
    ),
    (
        ["stages.assistant.relations={name: a, x: q, y: k}"],
        "--set: stages.0.relations: given the keys name, x, y; allowed: a list: [ITEM, …], or "
        "lines that begin with a dash",
    ),
    (
        ["stages.assistant.adam_betas=0.9"],
        "--set: stages.0.adam_betas: given 0.9; allowed: two numbers of at least 0 and below 1, "
        "as [0.9, 0.999]",
    ),
    (
        ["data={text: a.txt, tokenizer: owner/name, shards: rows}"],
        "--set: data: given the keys text, tokenizer, shards; allowed: either shards: FOLDER, "
        "tokens: PREFIX or a list of such, or text: FILES with tokenizer: REFERENCE",
    ),
    (
        ["data.text=s3://bucket/text"],
        "--set: data.text.0: given 's3://bucket/text'; allowed: a path on this machine",
    ),
    (
        ["shared={batch: 8}"],
        "--set: shared: unknown key (what merge keys take from is called x-…, as x-shared); "
        "allowed: name, seed, data, compute, stages, evaluation, promote, card, tracking, extends, vars",
    ),
    (
        ["data.cache=s3://bucket/cache"],
        "--set: data.cache: given 's3://bucket/cache'; allowed: a path on this machine",
    ),
    (
        ["stages.assistant.teacher=C:\\models\\bert"],
        "--set: stages.0.teacher: given 'C:\\\\models\\\\bert'; allowed: an earlier student's name, "
        "models:/NAME@ALIAS, models:/NAME/VERSION, package:IMPORT_NAME/PATH, a folder (/…, ./…, "
        "../…, ~/…) or a hub id OWNER/NAME",
    ),
    (
        ["stages.small.evaluate=[{probe: stsb}]"],
        "--set: stages.1.evaluate.0.probe: given 'stsb'; allowed: 'divergence', 'knn', 'cka', 'stsb-embed', "
        "'linear-cola', 'linear-sst2', 'linear-mrpc', 'linear-rte', 'linear-qnli', 'linear-qqp' or "
        "'linear-mnli'; did you mean 'stsb-embed'?",
    ),
    (
        ["stages.small.evaluate=[{probe: knn}, {probe: knn}]"],
        "--set: stages.1.evaluate.1.probe: given 'knn' a second time; allowed: each probe once",
    ),
    (
        ["stages.small.evaluate=[{probe: stsb-embed, every: 4}]"],
        "--set: stages.1.evaluate.0.data: missing; probe stsb-embed reads the files of task stsb-embed; give the "
        "folder that holds the task's folder, here or as evaluation.data",
    ),
    (
        ["stages.small.evaluate=[{probe: linear-sst2, data: «empty»}]"],
        "FILE: stage small: probe linear-sst2: task sst2 has no folder in «empty» (there: no folder); expected "
        "«empty»/SST-2 with train.tsv, dev.tsv",
    ),
    (
        ["stages.small.evaluate=[{probe: divergence, data: /x}]"],
        "--set: stages.1.evaluate.0.data: given '/x'; probe divergence reads the stage's own held-out rows; remove it",
    ),
    (
        ["stages.small.evaluate=[{probe: knn, data: «empty»}]"],
        "FILE: stage small: probe knn: '«empty»' holds no data set (manifest.json is missing); make one with: "
        "minilm data build",
    ),
    (
        ["data.seq_len=16", "stages.small.evaluate=[{probe: knn, data: «shards»}]"],
        "FILE: stage small: probe knn: data set «shards» has rows of 32 tokens, and the stage's have 16; build it "
        "with --seq-len 16",
    ),
    (
        ["stages.small.evaluate=[{probe: cka, data: «other-shards»}]"],
        "FILE: stage small: probe cka: data set «other-shards» was made with another tokenizer than the stage's data, "
        "and the same ids would mean other tokens; build it with the stage's tokenizer",
    ),
    (
        ["stages.small.schedule=wsd"],
        "FILE:18: stages.1.decay_steps: missing; schedule: wsd needs it, the steps of its decay, at most 36",
    ),
    (
        ["stages.small.decay_steps=8"],
        "--set: stages.1.decay_steps: given 8 with schedule: linear; allowed with schedule: wsd; remove it, or "
        "change the schedule",
    ),
    (
        ["stages.small.schedule=wsd", "stages.small.decay_steps=37"],
        "--set: stages.1.decay_steps: given 37; allowed: at most 36, the stage's 40 steps without its warm-up",
    ),
    (
        ["stages.small.eval_every=4", "stages.small.until={probe: divergence, patience: 2}"],
        "--set: stages.1.until: given with schedule: linear, whose rate at every step depends on where the stage "
        "ends; allowed: schedule: wsd with decay_steps, or schedule: constant",
    ),
    (
        ["stages.small.schedule=constant", "stages.small.until={probe: divergence, patience: 2}"],
        "--set: stages.1.until.probe: given 'divergence', which is measured before and after only; give the stage "
        "eval_every: STEPS",
    ),
    (
        ["stages.small.schedule=constant", "stages.small.until={probe: stsb-embed, share_of_teacher: 0.97}"],
        "--set: stages.1.until.probe: given 'stsb-embed'; allowed: a probe of the stage's evaluate, or divergence; "
        "add evaluate: [{probe: stsb-embed, every: STEPS, data: DIR}]",
    ),
    (
        [
            "stages.small.schedule=wsd",
            "stages.small.decay_steps=10",
            "stages.small.evaluate=[{probe: knn, every: 30}]",
            "stages.small.until={probe: knn, share_of_teacher: 0.97}",
        ],
        "--set: stages.1.until.probe: given 'knn', which is measured every 30 steps, not once between the warm-up "
        "(4) and step 30; give it a smaller every",
    ),
    (
        [
            "stages.small.schedule=constant",
            "stages.small.eval_every=4",
            "stages.small.until={probe: divergence, share_of_teacher: 0.97}",
        ],
        "--set: stages.1.until.share_of_teacher: given 0.97 of divergence, for which the teacher has no value; "
        "allowed: patience: MEASUREMENTS, or a share of another probe of evaluate",
    ),
    (
        [
            "stages.small.schedule=constant",
            "stages.small.eval_every=4",
            "stages.small.until={probe: divergence}",
        ],
        "--set: stages.1.until: given no condition; allowed: share_of_teacher: SHARE, patience: MEASUREMENTS, or "
        "both",
    ),
]

MENDED: list[tuple[list[str], list[str]]] = [
    (["data.seq_len=65"], ["data.seq_len=64"]),
    (["data.tokenizer=«other-tokenizer»"], ["data.tokenizer=«teacher»"]),
    (["data.held_out=0.0001"], ["data.held_out=0.1"]),
    (
        ["data.seq_len=16", "stages.small.evaluate=[{probe: knn, data: «shards»}]"],
        ["data.seq_len=32"],
    ),
    (["data.text=«one-word»", "data.packing=document"], ["data.text=«text»"]),
    (["stages.small.teacher=asistant"], ["stages.small.teacher=assistant"]),
    (["stages.assistant.teacher=small"], ["stages.assistant.teacher=«teacher»"]),
    (["stages.assistant.teacher=«short»"], ["data.seq_len=16"]),
    (
        ["stages.assistant.objective=embedding", "stages.assistant.teacher=«embedder»"],
        ["data.packing=sentence"],
    ),
    (
        ["stages.assistant.objective=embedding", "data.packing=sentence"],
        ["stages.assistant.embedding.pooling=mean"],
    ),
    (
        [
            "stages.assistant.objective=embedding",
            "data.packing=sentence",
            "stages.assistant.teacher=«embedder»",
            "stages.assistant.embedding.dims=[96, 48]",
        ],
        ["stages.assistant.embedding.dims=[48]"],
    ),
    (
        [
            "stages.assistant.objective=embedding",
            "data.packing=sentence",
            "stages.assistant.teacher=«embedder»",
            "stages.assistant.embedding.dense=false",
        ],
        ["stages.assistant.embedding.dense=null"],
    ),
    (["stages.assistant.teacher=«other-tokenizer»"], ["data.tokenizer=«other-tokenizer»"]),
    (["stages.small.teacher_layer=4"], ["stages.small.teacher_layer=3"]),
    (["stages.assistant.student.hidden=25"], ["stages.assistant.student.hidden=24"]),
    (
        ["stages.assistant.student.hidden=25"],
        [
            "stages.assistant.student.heads=5",
            "stages.assistant.relation_heads=1",
            "stages.small.relation_heads=1",
            "stages.small.student.heads=4",
        ],
    ),
    (["stages.small.student.hidden=25"], ["stages.small.student.hidden=28"]),
    (["stages.assistant.student.heads=5"], ["stages.assistant.student.heads=null"]),
    (["stages.small.student.heads=5"], ["stages.small.student.heads=null"]),
    (["stages.assistant.student.heads=2"], ["stages.assistant.student.heads=4"]),
    (["stages.assistant.student.heads=2"], ["stages.assistant.relation_heads=24"]),
    (["stages.small.student.heads=2"], ["stages.small.relation_heads=12"]),
    (
        ["stages.assistant.student.init=teacher-layers", "stages.assistant.student.layers=4"],
        ["stages.assistant.student.layers=3"],
    ),
    (
        ["stages.assistant.student.init=teacher-layers", "stages.assistant.student.hidden=96"],
        ["stages.assistant.student.init=random"],
    ),
    (
        ["stages.assistant.student.init=teacher-layers", "stages.assistant.student.ffn=400"],
        ["stages.assistant.student.ffn=192"],
    ),
    (
        [
            "stages.assistant.student.init=teacher-layers",
            "stages.assistant.student.heads=2",
            "stages.assistant.relation_heads=4",
        ],
        ["stages.assistant.student.heads=4"],
    ),
    (
        ["stages.assistant.teacher=«modernbert»", "stages.assistant.student.hidden=20"],
        ["stages.assistant.student.hidden=24"],
    ),
    (
        ["stages.assistant.teacher=«modernbert»", "stages.assistant.student.hidden=21"],
        ["stages.assistant.student.hidden=24"],
    ),
    (
        ["stages.assistant.teacher=«modernbert»", "stages.assistant.student.layers=5"],
        ["stages.assistant.student.layers=4"],
    ),
    (
        ["stages.assistant.teacher=«modernbert»", "stages.assistant.teacher_layer=2"],
        ["stages.0.teacher_layer=1"],
    ),
    (
        ["stages.assistant.teacher=«mpnet»", "stages.assistant.relation_heads=6"],
        ["stages.0.relation_heads=null"],
    ),
    (
        ["stages.assistant.teacher=«mpnet»", "stages.assistant.student.heads=2"],
        ["stages.assistant.student.heads=4"],
    ),
    (
        ["stages.assistant.objective=soft-label-mlm", "stages.assistant.teacher=«headless»"],
        ["stages.assistant.teacher=«masked»"],
    ),
    (["stages.small.objective=soft-label-mlm"], ["stages.small.objective=minilm"]),
    (
        ["stages.assistant.objective=layer-to-layer", "stages.assistant.student.layers=4"],
        ["stages.assistant.student.layers=3"],
    ),
    (["stages.assistant.objective=mini"], ["stages.assistant.objective=minilm"]),
    (["stages.assistant.relation_heads=5"], ["stages.assistant.relation_heads=4"]),
    (["stages.small.relation_heads=9"], ["stages.small.relation_heads=8"]),
    (["stages.assistant.batch=10"], ["compute.micro_batch=2"]),
    (["stages.assistant.micro_batch=3"], ["stages.assistant.micro_batch=2"]),
    (["compute.micro_batch=5"], ["compute.micro_batch=4"]),
    (
        ["compute.micro_batch=3", "stages.assistant.batch=6", "stages.small.batch=8"],
        ["compute.micro_batch=2"],
    ),
    (["stages.assistant.warmup_steps=40"], ["stages.assistant.warmup_steps=39"]),
    (["compute.workers=3"], ["compute.workers=2"]),
    (
        ["stages.small.schedule=constant", "stages.small.until={probe: divergence, patience: 2}"],
        ["stages.small.eval_every=4"],
    ),
    (["stages.small.schedule=wsd"], ["stages.small.decay_steps=36"]),
]
"""Overrides of ROWS, and then what their sentence advises: it must not lead into another error."""
