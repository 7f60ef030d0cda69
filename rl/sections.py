"""The sections of a config. Keys are TRL's where TRL has one; every field says what it means, in which unit."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def _finite_float(value: Any) -> Any:
    """YAML 1.1 reads `1e-5` as a string; users mean a number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _word_off(value: object) -> object:
    """YAML reads `off` without quotes as false."""
    return "off" if value is False else value


Number = Annotated[float, BeforeValidator(_finite_float), Field(allow_inf_nan=False)]


def _kinds(field: FieldInfo) -> set[Any]:
    """The plain types in a field's type."""
    found, left = set(), [field.annotation]
    while left:
        kind = left.pop()
        found.add(kind)
        left += get_args(kind)
    return found


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic reads `true` as 1; whoever writes it means something else."""
        if isinstance(value, bool):
            kinds = _kinds(cls.model_fields[info.field_name or ""])
            if {int, float} & kinds and not {bool, Any} & kinds:
                raise ValueError("a number is needed here, not true or false")
        return value


class LoraConfig(Section):
    """The adapter, by peft's names."""

    r: Positive = 16
    """Rank."""
    lora_alpha: Number | None = None
    """Scale numerator (scale = alpha / r); None: 2 × r."""
    lora_dropout: Fraction = 0.0
    """Dropout on the adapter's input; 0 in RL, where it makes trainer and rollout policies differ."""
    target_modules: Annotated[str | list[str], Field(min_length=1)] = "all-linear"
    """Module names, or all-linear for every linear layer except the head."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r."""
    init_from: str | None = None
    """Folder of a peft adapter to start from (a run's `adapter/`); its rank and targets then count."""

    @property
    def alpha(self) -> float:
        return self.lora_alpha if self.lora_alpha is not None else 2.0 * self.r


class CurriculumConfig(Section):
    """Which prompts RL visits again: by their running pass rate, those always or never solved are passed over
    (docs/sampling.md)."""

    enabled: bool = False
    """Whether prompts are passed over at all."""
    pass_reward: Number = 1.0
    """A completion passes whose total reward is at least this."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Weight of the former pass rate at each visit; 0: only the latest visit counts."""
    high: Fraction = 0.95
    """Pass rate from which on a prompt counts as solved."""
    low: Fraction = 0.05
    """Pass rate up to which it counts as hopeless."""
    min_visits: Positive = 2
    """Visits before a prompt may be passed over."""
    retry_probability: Fraction = 0.1
    """Chance that it is visited all the same."""

    @model_validator(mode="after")
    def _in_order(self) -> CurriculumConfig:
        if self.low >= self.high:
            raise ValueError(
                f"low is {self.low} and high is {self.high}: prompts between them are visited, so low < high"
            )
        return self


class DataConfig(Section):
    """Where rows come from. RL needs `prompt`; SFT `messages`, `conversations`, `text`, or `prompt` + `completion`;
    preferences `prompt`, `chosen`, `rejected`, or whole conversations in the last two (kto: `prompt`, `completion`,
    `label` too). In SFT and preferences the columns `tools` and `chat_template_kwargs` reach the chat template. Other
    columns reach the rewards by name."""

    dataset_name: str | None = None
    """Hub id, a .json / .jsonl / .csv / .parquet file, or `FILE.py:FUNCTION` that returns rows or a Dataset."""
    dataset_config: str | None = None
    """Configuration name of a hub data set."""
    dataset_train_split: str = "train"
    """Split of a hub data set to train on; for a Python function: its `split` argument, if it takes one."""
    dataset_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for a `FILE.py:FUNCTION`."""
    system_prompt: str | None = None
    """System message put before every conversational prompt that has none."""
    max_prompt_length: Positive | None = None
    """Prompts longer than this many tokens are dropped and counted; None: `model.max_length` minus the completion."""
    shuffle_dataset: bool = True
    """Draw rows in a seeded random order, a new one every epoch."""
    completion_only_loss: bool = True
    """SFT on `prompt` + `completion`: loss on the completion only."""
    assistant_only_loss: bool = True
    """SFT on `messages`: loss on assistant turns only."""
    max_examples: Positive | None = None
    """Use only the first so many rows."""
    curriculum: CurriculumConfig = Field(default_factory=CurriculumConfig)
    """Which prompts are visited again."""


class RolloutConfig(Section):
    """How completions are generated."""

    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """transformers: embedded, runs anywhere; vllm: in this process, on the trainer's weights; auto: vllm on a GPU where
    vLLM is installed and serves this model, else transformers."""
    num_generations: Annotated[int, Field(ge=1)] = 8
    """Completions per prompt (the group size, G)."""
    max_completion_length: Positive = 512
    """Longest completion in tokens."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Sampling temperature; trainer log-probs use the same."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus sampling; below 1.0 the log-probs of trainer and rollout are both renormalised over the nucleus."""
    top_k: NonNegative = 0
    """Sample among the k likeliest tokens; 0: off. Log-probs are renormalised likewise."""
    stop_token_ids: list[int] = Field(default_factory=list)
    """Further token ids that end a completion, beside the model's own end tokens."""
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Texts that end a completion, which includes them, as vLLM's `stop`; found wherever they stand in its text."""
    dynamic_sampling: bool = False
    """Generate for further prompts until the batch is full of groups whose rewards differ (DAPO; docs/sampling.md)."""
    max_resamples: Positive = 4
    """dynamic_sampling: tries after the first one; what is then missing is filled with groups without a signal."""
    max_in_flight: Positive | None = None
    """Completions generated at once; None: the whole batch, on a GPU as many as fit by the plan (vllm: 256 at most)."""
    max_model_len: Positive | None = None
    """vllm: longest prompt with completion in tokens; None: what the data's prompts and max_completion_length need."""
    kv_cache_gib: Annotated[Number, Field(gt=0)] | None = None
    """vllm: size of the KV cache, given back between rollouts; None: what the batch needs, or by the plan
    is free."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """vllm: fp8 halves the KV cache and adds mismatch with the trainer: keep algorithm.rollout_correction on."""
    numerics: Literal["trainer", "stock"] = "trainer"
    """vllm: trainer: logits in float32, as the trainer has them, and fused 4-bit products; stock: all as in a vLLM that
    loads the checkpoint itself (with bitsandbytes, for NF4) and compiles, whose greedy tokens these are. Slower."""
    enforce_eager: bool | None = None
    """vllm: no compilation and no CUDA graphs: starts in seconds, decodes several times slower; None: for a run that is
    over before capturing graphs would have paid."""
    torch_compile: bool | None = None
    """vllm: compile the model before CUDA graphs are captured, the longest part of a first start (kept on disk after
    it); false: graphs of vLLM's own kernels, for decoding alone; None: for a run that is long enough."""
    seed_per_completion: bool = True
    """vllm: every completion draws from a random stream of its own, whatever is beside it; false:
    one stream for a call, which spares a call per completion and token."""
    cudagraph_sizes: list[Positive] | None = None
    """vllm: batch sizes that CUDA graphs are captured for; None: a ladder up to max_in_flight (or 256), and on to 2,048
    where prompts take a good part of short rollouts."""


class AlgorithmConfig(Section):
    """The objective."""

    name: Literal["grpo", "sft", "dpo", "online_dpo"] = "grpo"
    """grpo: reinforcement learning from rewards; sft: supervised fine-tuning; dpo: preference tuning on a data set;
    online_dpo: on the best and the worst completion of every rollout group."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "reinforce"] = "dapo"
    """Objective and average: grpo per sequence; bnpo and dapo over all tokens of the optimiser batch; dr_grpo over
    batch × max_completion_length; cispo, sapo and reinforce replace the clip (see docs/objectives.md)."""
    loss: str | None = None
    """`FILE.py:function` or `module:function` that replaces loss_type's objective: gets (tokens, algorithm), returns
    a scalar tensor; loss_type still says how tokens are averaged (`tokens.weights`)."""
    importance_sampling_level: Literal["token", "sequence", "sequence_token"] = "token"
    """token: ratios per token; sequence: GSPO, one length-normalised ratio per sequence; sequence_token: GSPO-token."""
    epsilon: Annotated[float, Field(gt=0)] = 0.2
    """Lower clip range of the ratio (and upper, unless epsilon_high is set). GSPO wants about 3e-4."""
    epsilon_high: Annotated[float, Field(gt=0)] | None = None
    """Upper clip range (clip-higher); None: epsilon. For cispo the largest ratio itself, for example 5."""
    delta: Annotated[float, Field(gt=1)] | None = None
    """Dual clip: ratios above delta are cut for negative advantages too; None: off."""
    sapo_temperature_pos: Annotated[float, Field(gt=0)] = 1.0
    """SAPO's gate temperature for positive advantages."""
    sapo_temperature_neg: Annotated[float, Field(gt=0)] = 1.05
    """SAPO's gate temperature for negative advantages."""
    beta: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL term against the reference policy (the model with the adapter off); 0: no reference pass."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """k1: subtracted from the reward, summed over the completion; k2, k3: a term of the loss."""
    use_bias_correction_kl: bool = True
    """Multiply k3 by the importance ratio, which makes its gradient unbiased."""
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the entropy bonus, a mean over the optimiser batch's tokens."""
    top_entropy_quantile: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Only this share of the optimiser batch's tokens, those of the highest entropy, carries the objective."""
    advantage_estimator: Literal["group", "rloo", "reinforce_plus_plus"] = "group"
    """group: reward minus the group's mean, scaled by scale_rewards; rloo: minus the mean of the others; unscaled;
    reinforce_plus_plus: standardised over the batch."""
    advantage_level: Literal["episode", "turn"] = "episode"
    """turn: with an environment, each turn is learned from by its own reward and those of later turns, compared with
    the same turn of the group's other episodes; episode: all turns by the episode's reward."""
    turn_discount: Fraction = 1.0
    """advantage_level turn: factor γ of the next turn's reward, its square for the one after, and so on."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the standard deviation of the group, of the batch, or not at all (Dr. GRPO)."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """normalize_then_sum: standardise each reward within its group before weighting (GDPO)."""
    drop_uniform_groups: bool = False
    """Leave groups without any difference in reward out of the batch, averages included."""
    num_iterations: Positive = 1
    """Passes over each rollout batch."""
    label_smoothing_factor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """SFT: share of the target spread over the whole vocabulary."""
    z_loss_coef: Annotated[float, Field(ge=0)] = 0.0
    """SFT: weight of the squared log-partition function, which keeps logits from drifting."""
    mask_truncated_completions: bool = False
    """Completions cut by the length limit carry no loss."""
    rollout_correction: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        "token_truncate"
    )
    """Importance weight between trainer and engine log-probs: truncated (TIS) or masked outside its range (MIS)."""
    rollout_correction_max: Annotated[float, Field(gt=1)] = 3.0
    """Largest weight."""
    rollout_correction_min: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Smallest weight; None: 0."""

    @field_validator("scale_rewards", mode="before")
    @classmethod
    def _trl_booleans(cls, value: Any) -> Any:
        """TRL accepts booleans here; YAML turns a bare `none` into a string already but `no` into False."""
        if value is None or value is False:
            return "none"
        return "group" if value is True else value

    @property
    def epsilon_low(self) -> float:
        return self.epsilon

    @property
    def epsilon_upper(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high


class PreferenceConfig(Section):
    """Preference tuning: `algorithm.name: dpo` on pairs (or labelled answers), `online_dpo` on rollouts."""

    loss_type: Literal["sigmoid", "sigmoid_norm", "robust", "ipo", "hinge", "simpo", "orpo", "cpo", "kto"] = "sigmoid"
    """Objective, by TRL's names (see docs/objectives.md); kto takes rows with prompt, completion and label, or
    pairs, which it takes apart."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Factor of the scores: how far the policy may go from the reference; IPO's τ, ORPO's λ."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs thought to be labelled the wrong way round."""
    simpo_gamma: Annotated[float, Field(ge=0)] = 0.5
    """SimPO's target margin of the rewards."""
    sft_weight: Annotated[float, Field(ge=0)] | None = None
    """Weight of the chosen answers' cross-entropy; None: 1 for orpo and cpo, 0 for the others."""
    desirable_weight: Annotated[float, Field(ge=0)] = 1.0
    """KTO's weight of good answers."""
    undesirable_weight: Annotated[float, Field(ge=0)] = 1.0
    """KTO's weight of bad answers."""


class TrainConfig(Section):
    """The training loop."""

    max_steps: Positive | None = None
    """Optimiser steps; None: from num_train_epochs."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the data set, where max_steps is not given."""
    generation_batch_size: Positive | None = None
    """RL: completions per rollout, a multiple of num_generations; None: 8 prompts × num_generations."""
    steps_per_generation: Positive = 1
    """RL: optimiser steps that share one rollout batch (each sees a part of it)."""
    per_device_train_batch_size: Positive = 16
    """SFT: examples per optimiser step; dpo: pairs (or labelled answers)."""
    max_tokens: Positive | None = None
    """Tokens per pack (micro-batch), a limit on memory and never on the loss; None: on a GPU 16384,
    fewer where the plan says that this does not fit, and no fewer than the longest sequence; 4096 on a CPU."""
    worst_case_first: bool | Literal["auto"] = "auto"
    """Before anything else run one pack as large as packs can become, with the longest sequences that there can be, and
    throw the result away, so that memory ends in the first minute or not at all; auto: on a GPU."""
    share_prefix: bool = True
    """Compute a group's prompt once per pack for all its completions (exact gradients, fewer tokens)."""
    logprob_chunk_size: Positive = 1024
    """Rows of logits that exist at a time; [rows × vocabulary] is the only logits buffer."""
    gradient_checkpointing: bool | None = None
    """Without fused layers: recompute each layer in the backward pass from its input, which is kept where
    offload_activations says; None: on a GPU, and wherever offload_activations is true."""
    fused_layers: bool | None = None
    """Run packs through layers with a hand-written backward pass, which need a fraction of the memory; None: on a GPU,
    where the model's family is described."""
    offload_activations: bool | None = None
    """Keep what the backward pass needs of each layer in host memory; None: on a GPU where the plan
    says that it does not fit otherwise, or is slower."""
    mlp_tile_rows: Positive | None = None
    """Fused layers: rows that pass the MLP at a time; None: 4096, fewer where the plan says that a pack does not fit
    otherwise."""
    kv_head_groups: Positive | None = None
    """Fused layers: parts in which attention's KV heads are run; None: 1, 2 from 12,288 tokens on, 4 from 24,576 on,
    each head alone from 49,152 on, and where the plan says that a pack does not fit otherwise."""
    attention_memory: Literal["auto", "save", "recompute"] = "auto"
    """Fused layers: save attention's output for the backward pass, or recompute it, which takes half the host memory
    and a quarter more time in attention; auto: by the plan, else save where memory is enough."""
    projection_memory: Literal["auto", "save", "recompute"] = "auto"
    """Fused layers: keep queries, keys, values, gate and up for the backward pass on the device, in place of computing
    them again (a tenth of the time); auto: on a GPU, of as many layers as there is memory left for."""
    cuda_graphs: bool | Literal["auto"] = "auto"
    """Fused layers of a small model, on a GPU: record both passes of packs, padded to be alike, and replay them, which
    takes far fewer calls and a fraction of the time; auto: where the plan has room for what recordings keep."""


class OptimConfig(Section):
    """The optimiser of the adapter's weights (kept in float32)."""

    learning_rate: Annotated[Number, Field(gt=0)] = 1e-5
    """Peak learning rate. LoRA wants about ten times that of full training (TRL's GRPO default is 1e-6)."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after warm-up; linear and cosine end at zero."""
    warmup_steps: NonNegative = 0
    """Optimiser steps of linear rise to the peak."""
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are scaled down to this norm; 0: no clipping."""
    optim: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = "adamw_torch"
    """AdamW; 8bit: moments in a quarter of the memory (those of weights with fewer than 4096 elements stay in 32 bits);
    paged: moments move to host memory when the GPU is short of it. All but adamw_torch need bitsandbytes and a GPU."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """First-moment decay."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Second-moment decay."""
    adam_epsilon: Annotated[Number, Field(gt=0)] = 1e-8
    """Denominator term."""
    max_skipped_updates: Positive = 10
    """An update whose gradient is not finite is left out; after so many in a row the run stops and says why. So it does
    after so many rollouts on which a reward has failed throughout (rewards.on_error)."""


class EvalConfig(Section):
    """Held-out evaluation, through the same engine and the same rewards."""

    dataset_name: str | None = None
    """As `data.dataset_name`; None: no evaluation."""
    dataset_config: str | None = None
    """Configuration name of a hub data set."""
    dataset_test_split: str = "test"
    """Split of a hub data set; for a Python function: its `split` argument, if it takes one."""
    dataset_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for a `FILE.py:FUNCTION`."""
    max_examples: Positive | None = None
    """Use only the first so many rows."""
    eval_steps: NonNegative = 0
    """Evaluate every so many steps; 0: only before and after."""
    eval_on_start: bool = True
    """Evaluate before the first step, so that there is something to compare with."""
    num_generations: Positive = 1
    """Completions per prompt; the score is their mean."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0: greedy."""
    score: str | None = None
    """Name of the reward that is the held-out score; None: the weighted total."""


class LogConfig(Section):
    """What is recorded, and where."""

    report_to: list[Literal["wandb"]] = Field(default_factory=list)
    """Trackers beside `metrics.jsonl`, which is always written."""
    wandb_mode: Literal["online", "offline", "disabled"] = "online"
    """offline: kept in the run folder until `wandb sync`."""
    wandb_project: str = "tandem"
    """Project name in wandb."""
    logging_steps: Positive = 1
    """Console line and tracker record every so many steps."""
    log_completions: bool = True
    """Keep every completion with its rewards under `rollouts/` and send a table to the trackers."""
    num_completions_to_print: NonNegative = 0
    """Completions shown in the console at every logged step."""

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_none(cls, value: Any) -> Any:
        if value in (None, "none", False):
            return []
        return [value] if isinstance(value, str) else value


class CheckpointConfig(Section):
    """Checkpoints hold adapter, optimiser, random state, data position and counters."""

    save_steps: NonNegative = 50
    """Every so many steps; 0: only at the end and when stopped."""
    save_total_limit: Positive | None = 2
    """Keep the newest so many; None: all. Where the newest is damaged, a run goes on from the one before."""
    journal: bool = True
    """Bring every rollout to the disk (`journal.jsonl`) before anything is learned from it, so that an interrupted run
    does not generate it again and `rl-train replay` can learn from it anew."""


class ParityConfig(Section):
    """Whether engine and trainer compute the same policy: their log-probs of the same sampled tokens, compared in every
    step (free of a forward pass, except for online_dpo) and logged as `parity/*`."""

    action: Annotated[Literal["stop", "warn", "off"], BeforeValidator(_word_off)] = "stop"
    """Beyond a limit. stop: end the run with a checkpoint from before the step, and the likely causes; warn: say so and
    go on; off: no comparison."""
    check_steps: Positive = 10
    """Hold the numbers against the limits every so many steps, beside the first of every start."""
    max_mean: Annotated[Number, Field(gt=0)] | None = None
    """Largest mean of |Δ log-prob|, nats per token; None: 0.001 in float32, 0.01 in float16 and 0.05 in bfloat16 (5
    times that where no fault explains it), 0.15 with an fp8 KV cache (2 times)."""
    max_p99: Annotated[Number, Field(gt=0)] | None = None
    """Largest 99th percentile of |Δ log-prob|, nats; None: 0.01 in float32, 0.1 in float16, 0.5 in bfloat16, 1.5 with
    an fp8 KV cache, and so many times that."""
    min_token_ess: Fraction | None = None
    """Smallest effective sample size of the tokens' importance ratios, as a share; None: 0.99 in float32, 0.95 in
    float16, 0.8 in bfloat16, 0.5 with an fp8 KV cache."""
    min_sequence_ess: Fraction = 0.0
    """The same for whole completions, whose ratios spread with their length also in sound runs; 0: no limit."""


class WarmupConfig(Section):
    """Supervised fine-tuning of the same adapter before RL starts, to teach a format the base model never tries."""

    max_steps: NonNegative = 0
    """Optimiser steps of SFT; 0: no warm-up."""
    dataset_name: str | None = None
    """As `data.dataset_name`, with SFT columns."""
    dataset_config: str | None = None
    """Configuration name of a hub data set."""
    dataset_train_split: str = "train"
    """Split of a hub data set."""
    dataset_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for a `FILE.py:FUNCTION`."""
    per_device_train_batch_size: Positive = 16
    """Examples per optimiser step."""
    learning_rate: Annotated[Number, Field(gt=0)] = 1e-4
    """Constant learning rate of the warm-up."""
