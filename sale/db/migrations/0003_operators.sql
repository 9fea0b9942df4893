-- Operators' accounts.

create table operator (
    name       text primary key
               constraint operator_name_length check (length(name) between 1 and 64),
    role       text not null
               constraint operator_role_known
               check (role in ('admin', 'operator', 'clerk', 'auditor')),
    union_code text not null default 'district',
    token_hash bytea null unique constraint operator_token_hash_length check (length(token_hash) = 32),
    disabled   boolean not null default false,
    created_at timestamptz not null default now(),
    constraint operator_disabled_has_no_token check (not disabled or token_hash is null)
);
comment on table operator is 'Accounts of those who run campaigns, sell at counters, or audit.';
comment on column operator.name is 'As the account is called; the audit log names it.';
comment on column operator.role is 'What the account may do.';
comment on column operator.union_code is 'The union for which the account acts; district: all of them.';
comment on column operator.token_hash is
    'SHA-256 of the bearer token (256 random bits, so no salt is needed); null: no token.';
comment on column operator.disabled is 'Accounts are never deleted: the audit log names them.';
comment on column operator.created_at is 'When it was made.';
