"""Where the joules come from.

turns         the energy pass: windows of prefill and generation, one of each a turn
metering      one window around a piece of work
counters/     what is read: NVML, RAPL, zeus, or nothing with its reason
tick, power   how often a counter moves; power integrated beside it
estimate      a model of the CPU, only where it was asked for
"""
