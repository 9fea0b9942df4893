-- name: add -- A new account without a token; no row where the name is taken.
insert into operator (name, role, union_code) values ($1, $2, $3)
    on conflict (name) do nothing
returning name, role, union_code, token_hash is not null as has_token, disabled, created_at;

-- name: all -- Every account, by name.
select name, role, union_code, token_hash is not null as has_token, disabled, created_at
  from operator order by name;

-- name: lock -- One account, held until the commit.
select name, role, union_code, token_hash is not null as has_token, disabled, created_at
  from operator where name = $1 for update;

-- name: disable -- Takes the token away too, so that no copy of it works again.
update operator set disabled = true, token_hash = null where name = $1;

-- name: set_token -- The earlier token of this account ends here.
update operator set token_hash = $2 where name = $1;

-- name: by_token -- The account of a token.
select name, role, union_code, true as has_token, disabled, created_at
  from operator where token_hash = $1 and not disabled;

-- name: write_audit -- One operator action: who, what, on what, why (INV-10).
insert into audit_log (actor, action, target, reason, data) values ($1, $2, $3, $4, $5::jsonb);
