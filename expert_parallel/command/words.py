"""What the words in the report of expert_parallel_poc.py mean: the end of its --help."""

WORDS = """words in the report:
  load per device        share of the slots, (token, chosen expert) pairs, that
                         each device computes; contiguous: experts in order
  off mlx-lm, off dense  largest difference of a value from mlx-lm's layer, and
                         from computing every expert for every token
  one pass               route (choose experts), dispatch (copy tokens to
                         devices), compute, combine (weigh and add up);
                         medians of so many passes
  machines               the same if each device were a machine: compute is the
                         mean of the devices, straggler what the slowest takes
                         longer, communication from --bandwidth and --latency;
                         the largest is the bottleneck, of the sum
  balancedness           mean device load over the fullest one's; 1 is even
  if uniform             what routing without any preference would give for as
                         many tokens: the level of chance
  seen after             tokens until an expert chosen n times counts as hot
  loads that last        cosine of expert loads of fit and test; if shuffled:
                         what the number of tokens alone costs
  among copies           slots of the fullest device for other ways to deal them
  affinity's bound       how much fuller than balanced's its fullest device is
  fit, test              balancedness on the tokens that a remedy was fitted on,
                         and on those that judge it
  fan-out                devices that a token is sent to
  modelled, fit          ms of the slowest device, from the fit's balancedness;
  measured, test         run on 512 test tokens, in turn with the others
  round-robin            expert e on device e mod D
  balanced               experts placed so that the fullest device has least
  replicated             balanced, with copies of hot experts
  affinity               experts chosen together are placed together
  cap and drop           an expert takes 1.25 times its even share of a batch;
                         the slots beyond are lost (re-route: go to the next
                         best expert). Changes the model's output
  load-aware router      a bias on the choice levels the devices. Changes the
                         model's output
  over budget            hit rate of a cache of experts for each layer on one
                         device, by who makes room: lru, used longest ago; lfu,
                         used least; aging, lfu whose counts halve; belady, the
                         bound; the wait of the best with --expert-bytes, --disk
  gone, lost, mended     with --fail-device: experts that nobody holds any more;
                         slots that nobody answers, by chance the share of
                         experts gone; after survivors have read these
  each                   with one copy of each expert on another device
  before, since          balancedness of the test before and after the loss
  survives one, two      share of all single losses, of all sets of two, after
                         which every expert still has a holder
  foretold               of the experts that tokens want in a layer, those that
                         the fit's pairs foretell from the layer before
  rebalancing            balanced, and experts move while that repays the pause
"""
