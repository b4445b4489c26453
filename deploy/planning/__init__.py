"""`slipstream plan`: what a run would cost, from a simulation of it.

workload.py  what is computed: response lengths, filtered share, evaluations
rates.py     how fast: the rates of actor, learner and push, and where they come from
simulate.py  the discrete-event simulation
calibrate.py rates and workload of a recorded run
recommend.py the best split of a number of GPUs
"""
