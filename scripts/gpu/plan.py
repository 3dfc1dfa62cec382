"""What the acceptance run computes with, trains and measures: words of the commands, and seconds."""

# Stated in full: what is checked must not depend on the defaults.
COMPUTE = "device=cuda batch_size=500 bf16=true channels_last=true compile=true graphs=false"
TRAINER = "accelerator=gpu devices=1 precision=bf16-mixed channels_last=true compile=true"
CPU_COMPUTE = "device=cpu batch_size=16 bf16=false channels_last=false compile=false graphs=false winograd=false"
CPU_TRAINER = "accelerator=cpu devices=1 precision=32-true channels_last=false compile=false winograd=false"
# A run of minutes: a large batch and rate, a short warm-up, averages over a ninth of the run, 2,000, 500 and 100 steps.
RECIPE = (
    "trainer.max_steps=1000000 trainer.batch_size=256 trainer.log_every=100 trainer.checkpoint_every=4000 "
    "trainer.keep_last=1 optim.lr=0.0006 optim.warmup=500 ema.decay=[0.9999,0.9995,0.998,0.99] ema.warmup=true"
)
TINY_RECIPE = (
    "trainer.max_steps=10 trainer.batch_size=8 trainer.log_every=5 ema.decay=[0.9999,0.9995] ema.warmup=true "
    "network.ch=32 network.num_groups=8 network.ch_mult=[1,2] network.num_res_blocks=1"
)
SWEEP, TINY_SWEEP = "n=5000 metric.batch_size=500 metric.metrics=[fd]", "n=20"
# x̂0 is clipped: a network that was trained for minutes sends trajectories out of [-1, 1].
CLIP = "sampler.clip=x0"
# Sweeps, the most important first. The steps before the samplers: all samplers of one S, then of the next, so that
# there are columns when the time is up. Other weights would be compiled again; precision and recall take a minute.
SWEEPS = {
    "table": f"{CLIP} sampler.S=10,20,50,5 sampler=ddim,ddim_eta05,ddpm,ddim_eta02,sigma_hat",
    "solvers": "sampler.clip=x0_and_eps sampler.S=null sampler.nfe=5,10,20 sampler=ddim,dpm_solver_pp,unipc,deis,ipndm",
    "averages": f"{CLIP} sampler.S=20 sampler=ddim,ddpm "
    "weights=ema_0.9995,ema_0.998,ema_0.99,online compute.compile=false",
    "unclipped": "sampler.S=10,20 sampler=ddim,ddpm,dpm_solver_pp,unipc",
    "many_steps": f"{CLIP} sampler.S=100 sampler=ddpm,ddim,ddim_eta05,ddim_eta02,sigma_hat",
    "precision_recall": f"{CLIP} sampler.S=10,50 sampler=ddim,ddpm metric.metrics=[prc]",
}
TINY_SWEEPS = {
    "table": "sampler.S=2,3 sampler=ddim,sigma_hat_clamped",
    "solvers": "sampler.S=null sampler.nfe=4 sampler=ddim,unipc",
    "averages": "sampler.S=2 weights=ema_0.9995,online",
    "precision_recall": "sampler.S=2 sampler=ddim,ddpm metric.metrics=[prc]",
}
LATER = 240  # seconds of the training part for what follows the training
PROFILE = 150  # seconds at most for the profile of a step, most of which compiles
FIGURES = 60  # seconds of these for what follows the first sweep
# The tests marked gpu that compile, by -k: each takes half a minute or more.
COMPILES = "compile or graphs or fast_settings"
