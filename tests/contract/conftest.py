from hypothesis import settings

# Machines are busy: slowness is no failure. Properties of values need no hundred examples each.
settings.register_profile("contract", deadline=None, max_examples=40)
settings.load_profile("contract")
