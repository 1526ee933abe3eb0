"""What makes a record valid: the kinds of fields, the contract, and the judge that applies it to records.

A contract of your own begins with: from pipeline.contract import Boolean, Contract, Integer, Number, Text, Timestamp
"""

from pipeline.contract.contract import Contract as Contract
from pipeline.contract.fields import Boolean as Boolean
from pipeline.contract.fields import Integer as Integer
from pipeline.contract.fields import Number as Number
from pipeline.contract.fields import Text as Text
from pipeline.contract.times import Timestamp as Timestamp
